"""Which package the tokenizer files of a folder need: transformers guesses it from their names, and wrongly."""

import importlib.util
from pathlib import Path

from transformers import PreTrainedTokenizerBase

_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
_TIKTOKEN = {"tiktoken": "tiktoken"}
_MISTRAL = {"mistral_common": "mistral-common"}
_FIELD_OF_PIECES = b"\x0a"
"""The first byte of a sentencepiece model: protocol buffers' mark of its first field, the list of pieces."""


def lacking(folder: Path) -> str | None:
    """What a folder's only tokenizer file is, and the command that brings the packages that read it; None if none
    lacks.

    A tokenizer.json needs none, and is read before all others.
    """
    if (folder / "tokenizer.json").is_file():
        return None
    for path in sorted(folder.iterdir()):
        kind, packages = _kind(path)
        if not all(map(_here, packages)):
            return (
                f"{path.name} is {kind}, there is no tokenizer.json, and what reads it is not installed: pip install"
                f" {' '.join(packages.values())}. Or write tokenizer.json where it is:"
                " AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
    return None


def absent(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Names of the vocabulary files that a loaded tokenizer's class reads and its folder has not: without them
    transformers builds it with a handful of tokens, and says nothing.
    """
    if (folder / "tokenizer.json").is_file():
        return []
    files: dict[str, str] = getattr(type(tokenizer), "vocab_files_names", None) or {}
    wanted = [files[part] for part in ("vocab_file", "merges_file") if part in files]
    return [name for name in wanted if not (folder / name).is_file()]


def _kind(path: Path) -> tuple[str, dict[str, str]]:
    """What a file is, in words, and the modules that read it with the packages they come in."""
    if path.name == "tekken.json":
        return "a tokenizer of mistral-common", _MISTRAL
    if path.name.endswith(".tiktoken"):
        return "a tiktoken vocabulary", _TIKTOKEN
    if path.suffix != ".model" or not path.is_file():
        return "", {}
    with path.open("rb") as file:  # tokenizer.model is what two libraries call their files
        pieces = file.read(1) == _FIELD_OF_PIECES
    return ("a sentencepiece model", _SENTENCEPIECE) if pieces else ("a tiktoken vocabulary", _TIKTOKEN)


def _here(module: str) -> bool:
    """Whether a module can be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it would lie in
        return False
