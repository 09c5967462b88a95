"""Reading a model's tokenizer; code of its own is never run."""

from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from compresso.checkpoint.code import refuse_code
from compresso.checkpoint.folder import read_json
from compresso.checkpoint.reasons import reason_of
from compresso.checkpoint.source import Source
from compresso.checkpoint.tokenizer_files import absent, lacking
from compresso.errors import CheckpointError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json", "tekken.json")


def has_tokenizer(source: Source) -> bool:
    """Whether the model's folder holds tokenizer files."""
    return source.folder is not None and any((source.folder / name).is_file() for name in _TOKENIZER_FILES)


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        CheckpointError: the folder holds none that can be built without running its code.
    """
    if source.folder is None or not has_tokenizer(source):
        if source.file is not None:
            raise CheckpointError(
                f"{source.file} holds no tokenizer. Give a GGUF with one, or the folder that it was made from."
            )
        raise CheckpointError(
            f"model {source.name} has no tokenizer. Copy tokenizer.json and tokenizer_config.json into its folder."
        )
    refuse_code(source.folder)
    described = source.folder / "tokenizer_config.json"
    own_code = described.is_file() and bool(read_json(described).get("auto_map"))
    try:
        # of a GGUF the tokenizer was built from what it holds, and no model type's own class knows better
        loader: Any = AutoTokenizer if source.file is None else PreTrainedTokenizerFast
        tokenizer = loader.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizer files of any origin fail in any way
        if own_code:
            raise CheckpointError(
                f"the tokenizer of {source.name} cannot be loaded without code of its own (auto_map in {described}),"
                " which is never run. Write tokenizer.json, and name a tokenizer class of transformers in the file."
            ) from error
        if (cure := lacking(source.folder)) is not None:
            raise CheckpointError(f"the tokenizer of {source.name} cannot be loaded: {cure}") from error
        raise CheckpointError(
            f"the tokenizer of {source.name} cannot be loaded: {reason_of(error).rstrip('.')}. Fetch its files again,"
            " or copy tokenizer.json and tokenizer_config.json of the model it came from."
        ) from error
    if missing := absent(source.folder, tokenizer):
        cure = lacking(source.folder) or "copy tokenizer.json, or these files, of the model it came from"
        raise CheckpointError(
            f"the tokenizer of {source.name} cannot be loaded: a {type(tokenizer).__name__} reads {', '.join(missing)},"
            f" which the folder has not; {cure}."
        )
    _try_out(source.name, tokenizer)
    tokenizer.init_kwargs.pop("auto_map", None)  # what is written from this tokenizer must not name code either
    return tokenizer


def _try_out(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Encode and decode a text: a setting of another kind than it should be is met with at the first use.

    Raises CheckpointError.
    """
    try:
        ids = list(tokenizer("a")["input_ids"])  # pyright: ignore[reportArgumentType]
        tokenizer.decode(ids, skip_special_tokens=True)
        whole = all(type(one) is int and one >= 0 for one in ids)
    except Exception as error:  # as in loading
        raise CheckpointError(
            f"the tokenizer of {name} does not encode a text: {reason_of(error).rstrip('.')}. Fetch its files again."
        ) from error
    if not whole:
        raise CheckpointError(f"the tokenizer of {name} encodes a text as {str(ids)[:60]}; fetch its files again.")
