"""Opening a model: everything that can be wrong is found before its weights are read.

`open_source` looks at names, sizes, links, the config and the safetensors headers, and compares these with what the
architecture expects, on the meta device. Only `load_model` reads weights; it never fills a gap with random numbers.
"""

import copy
import hashlib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from compresso.checkpoint import hub
from compresso.checkpoint.atomic import sha256
from compresso.checkpoint.bounds import check_layers, check_tables
from compresso.checkpoint.code import refuse_code, refuse_fields
from compresso.checkpoint.folder import (
    check_folder,
    check_generation_config,
    read_config,
    read_json,
    stored_names,
    stored_tensors,
)
from compresso.checkpoint.gguf_folder import describe_gguf, is_gguf, only_gguf
from compresso.checkpoint.header import TensorInfo
from compresso.checkpoint.links import check_links
from compresso.checkpoint.reasons import reason_of
from compresso.checkpoint.tensors import HEADS, check_tensors, is_packed, listed, untied_as_stored
from compresso.checkpoint.tokenizer_files import absent, lacking
from compresso.edit.stock import as_stock
from compresso.errors import ArchError, CheckpointError, NumericError, ResourceError

log = logging.getLogger(__name__)

_READERS = (AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoModelForQuestionAnswering)
_BOTH_WAYS = ("bert", "roberta", "distilbert")
"""Encoders of texts that are described here; a config that names no class means the bare model."""
_ENCODERS = (*_READERS, AutoModelForImageClassification, AutoModel)
_FULL_HASH_BELOW = 1_000_000_000  # bytes
_SAMPLES, _SAMPLE_BYTES = 64, 65_536


@dataclass(frozen=True, slots=True)
class Identity:
    """What a model is called and what it is: a name without a path, and `sha256:…` or, for large ones,
    `sampled-sha256:…`.
    """

    name: str
    fingerprint: str


@dataclass(frozen=True)
class Source:
    """A model that passed every check that needs no weights.

    Args:
        config: its config; code the folder may bring along was not run.
        folder: where its files lie; None if only a config.json was given. Of a GGUF file, a temporary folder with what
            is in it.
        kind: "folder", "hub", "gguf" or "config" (no weights, only shapes).
        name: hub name, or the last part of the path.
        tensors: stored tensors by parameter name; empty if the weights were not asked for.
        config_file: the config.json itself.
        revision: commit of a hub model.
        file: the GGUF file that it was read from.
    """

    config: PreTrainedConfig
    folder: Path | None
    kind: Literal["folder", "hub", "gguf", "config"]
    name: str
    config_file: Path
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict[str, TensorInfo])
    revision: str | None = None
    file: Path | None = None

    @cached_property
    def identity(self) -> Identity:
        """Name and fingerprint of config and weights.

        Below 1 GB every byte is hashed. Above, each file's size, its first and 64 evenly spaced pieces of 64 KiB: a
        training step changes all of them, and a large model is named in a second; a single altered element may go
        unnoticed.
        """
        digest = hashlib.sha256(self.config_file.read_bytes())
        files = (
            [self.folder / name for name in sorted({tensor.file for tensor in self.tensors.values()})]
            if self.folder
            else []
        )
        whole = sum(path.stat().st_size for path in files) < _FULL_HASH_BELOW
        for path in files:
            digest.update(f"\n{path.name} {path.stat().st_size} ".encode())
            digest.update((sha256(path) if whole else _sampled(path)).encode())
        return Identity(self.name, ("" if whole else "sampled-") + "sha256:" + digest.hexdigest())


def open_source(model: str | Path, weights: bool = True, packed: bool = False) -> Source:
    """Find a model and check it: a local folder of safetensors, a GGUF file, a hub name, or a config.json (no weights).

    A folder without config.json that holds one GGUF file stands for that file, `owner/name/file.gguf` for one on the
    hub. With `weights=False` a folder's or hub model's config is enough, and weights are neither fetched nor looked at.
    With `packed=True` they may be stored in few bits, for those who run a model and change nothing in it.

    Raises:
        CheckpointError: with the cure, naming files and tensors.
        ResourceError: a download does not fit.
    """
    path = Path(model).expanduser()
    try:
        if path.is_file():
            return _open_file(path, weights, packed)
        if path.is_dir():
            return _open_folder(path, "folder", path.resolve().name, weights, packed)
        if path.exists():
            raise CheckpointError(
                f"model {model} is a device, pipe or socket. Give a folder, a GGUF file, or a config.json."
            )
        if isinstance(model, str) and hub.is_hub_file(model):
            file, revision = hub.fetch_file(model)
            return replace(_open_gguf(file, weights), revision=revision)
        if not isinstance(model, str) or not hub.is_hub_name(model):
            raise CheckpointError(
                f"model {model} does not exist. Give a folder, a GGUF file, a hub name such as owner/name, or a"
                " config.json."
            )
        folder, revision = hub.fetch(model, weights)
        return replace(_open_folder(folder, "hub", model, weights, packed), revision=revision)
    except OSError as error:
        raise CheckpointError(
            f"model {model} cannot be read: {error.strerror or error}. Check the path and its permissions."
        ) from error


def auto_class(config: PreTrainedConfig) -> Any:
    """Which of transformers' auto classes opens a model: the one whose class the config's `architectures` names, else a
    causal one.

    Raises:
        ArchError: the config names none of a causal language model, a masked one, a classifier, one that finds answers
            or a bare model, and is not causal.
    """
    named = (getattr(config, "architectures", None) or [""])[0]
    for auto in (AutoModelForCausalLM, *_ENCODERS):
        mapping: Any = auto._model_mapping
        if type(config) in mapping and mapping[type(config)].__name__ == named:
            return auto
    if (
        type(config) in AutoModelForCausalLM._model_mapping and config.model_type not in _BOTH_WAYS
    ):  # transformers has a causal BERT too
        return AutoModelForCausalLM
    if not named and config.model_type in (*_BOTH_WAYS, "vit"):
        return AutoModel
    said = f"the architecture {named}" if named else "no architecture"
    raise ArchError(
        f"{config.model_type} with {said} is not opened. Give a causal language model, or an encoder with a stock head."
    )


def is_causal(config: PreTrainedConfig) -> bool:
    """Whether a model is opened as a causal language model: what data, training and reports need."""
    return auto_class(config) is AutoModelForCausalLM and config.model_type not in _BOTH_WAYS


def is_text_encoder(config: PreTrainedConfig) -> bool:
    """Whether a model is opened as an encoder of texts with a head: one that guesses masked tokens, classifies, or
    finds answers.
    """
    return auto_class(config) in _READERS


def meta_model(source: Source) -> PreTrainedModel:
    """The model's modules on the meta device, as its family's stock class: names and shapes without memory.

    Raises:
        ArchError: it is of no kind that is opened.
        CheckpointError: its config asks for the impossible.
    """
    return as_stock(_as_written(source))


def load_model(source: Source, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Read the weights (in the stored dtype unless one is given) and return the model in eval mode.

    Raises:
        CheckpointError: there are no weights or they do not fill the model exactly.
        NumericError: naming a tensor with NaN or Inf.
        ResourceError: memory does not suffice.
    """
    if source.folder is None or not source.tensors:
        raise CheckpointError(
            f"model {source.name} was opened without weights, and this needs them. Give its folder or hub name."
        )
    refuse_code(source.folder)  # once more, as the folder may have changed since it was opened
    try:
        model, info = auto_class(source.config).from_pretrained(  # a pair, as asked for
            source.folder,
            config=_unpacking(source.config),
            dtype=dtype or "auto",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        if gaps := sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"]):
            raise CheckpointError(f"model {source.name} lacks weights for {listed(gaps)}. Fetch or write it again.")
        for name, tensor in model.state_dict().items():
            if (
                tensor.is_floating_point()
                and tensor.numel()
                and not all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor))
            ):
                raise NumericError(
                    f"model {source.name}: '{name}' holds NaN or Inf. Fetch the model again, or train it again."
                )
        if is_packed(source.config):
            log.warning(
                "%s: its packed weights were unpacked, so it runs, and takes memory, as a dense model", source.name
            )
            _as_dense_(model)
        return model.to(device)
    except ImportError as error:
        raise CheckpointError(f"model {source.name} is not opened without a package: {reason_of(error)}") from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ResourceError(
            f"model {source.name} does not fit into memory of {device}. Use a smaller model or --device cpu."
        ) from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"model {source.name} cannot be loaded: {reason_of(error)}") from error


def numbers_of(source: Source) -> int:
    """How many numbers a model has in memory; of packed weights, once they are unpacked."""
    if is_packed(source.config):
        return sum(parameter.numel() for parameter in meta_model(source).parameters())
    return sum(math.prod(tensor.shape) for tensor in source.tensors.values())


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


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json", "tekken.json")


def _unpacking(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a config; of packed weights, one by which they are read as plain numbers."""
    copied = copy.deepcopy(config)
    if is_packed(config):
        copied.quantization_config = {**config.quantization_config, "dequantize": True}  # pyright: ignore[reportAttributeAccessIssue]
    return copied


def _as_dense_(model: PreTrainedModel) -> None:
    """Let a model whose weights were unpacked say no more that they are packed: it is moved and cast as any other."""
    for owner, names in (
        (model, ("hf_quantizer", "is_quantized", "quantization_method")),
        (model.config, ("quantization_config", "_pre_quantization_dtype")),
    ):
        for name in names:
            vars(owner).pop(name, None)


def _open_file(path: Path, weights: bool, packed: bool) -> Source:
    """A model that is one file."""
    if path.suffix == ".json":
        config = read_config(path, packed)
        refuse_fields(path, read_json(path))
        return Source(config, None, "config", path.resolve().parent.name, path)
    if is_gguf(path):
        return _open_gguf(path, weights)
    raise CheckpointError(f"model {path} is a file; give the folder it lies in, a GGUF file, or a config.json.")


def _open_gguf(path: Path, weights: bool) -> Source:
    """A GGUF file, through a temporary folder that passes the same checks as any other."""
    described = describe_gguf(path)
    folder, config_file = described.folder, described.folder / "config.json"
    try:
        source = Source(read_config(config_file), folder, "gguf", folder.name, config_file, file=path)
        tied = source.config.tie_word_embeddings
        wanted = {name: tuple(one.shape) for name, one in _as_written(source).state_dict().items()}
        described.check({name: shape for name, shape in wanted.items() if not (tied and name == "lm_head.weight")})
        if not weights:
            return source
        described.write()
        return replace(_open_folder(folder, "gguf", folder.name, True, False), file=path)
    except CheckpointError as error:  # the folder is nobody's to look into
        raise CheckpointError(
            str(error).replace(str(config_file), str(path)).replace(str(folder), str(path))
        ) from error


def _open_folder(
    folder: Path, kind: Literal["folder", "hub", "gguf"], name: str, weights: bool, packed: bool
) -> Source:
    if (file := only_gguf(folder)) is not None:
        check_links(folder)
        return _open_gguf(file, weights)
    check_folder(folder)
    config = read_config(folder / "config.json", packed)
    refuse_code(folder)
    check_generation_config(folder)
    tensors = stored_tensors(folder) if weights else {}
    if type(config).__module__.startswith("transformers."):  # layers of our own types may have lost all their tensors
        layers = getattr(config, "num_hidden_layers", None)
        check_layers(folder / "config.json", layers, tensors if weights else stored_names(folder))
    source = Source(config, folder, kind, name, folder / "config.json", tensors)
    if weights:
        _check_tensors(source)
    elif _may_be_tied(config):
        _untie_as_stored_(source, _stored_if_readable(folder))
    return source


def _may_be_tied(config: PreTrainedConfig) -> bool:
    return bool(getattr(config, "tie_word_embeddings", False))


def _stored_if_readable(folder: Path) -> Mapping[str, TensorInfo]:
    """The stored tensors; none where they are absent or damaged, for a config alone is enough to count a model."""
    try:
        return stored_tensors(folder)
    except CheckpointError:
        return {}


def _untie_as_stored_(source: Source, stored: Mapping[str, TensorInfo]) -> None:
    """Let the config say that head and embedding are apart, where the stored tensors say so."""
    assert source.folder is not None  # tensors lie in one
    if _may_be_tied(source.config) and any(name.endswith(HEADS) for name in stored):
        model = _as_written(source)
        if untied_as_stored(source.config, model, source.folder, stored):
            source.config.tie_word_embeddings = False


def _as_written(source: Source) -> PreTrainedModel:
    """The model's modules on the meta device: names and shapes without memory.

    Raises ArchError if it is of no kind that is opened, CheckpointError if its config asks for the impossible.
    """
    auto = auto_class(source.config)
    try:
        with torch.device("meta"):
            model = auto.from_config(copy.deepcopy(source.config), trust_remote_code=False)
    except Exception as error:  # a config may ask for anything, and modelling code fails on it in any way
        raise CheckpointError(
            f"{source.config_file} describes a model that cannot be built: {reason_of(error).rstrip('.')}. Check the"
            " config."
        ) from error
    check_tables(source.config_file, model)
    return model


def _check_tensors(source: Source) -> None:
    """Raise CheckpointError if the folder's tensors are not its model's. Its config is told if they untie the head."""
    _untie_as_stored_(source, source.tensors)
    assert source.folder is not None  # weights lie in one
    check_tensors(source.folder, source.config, auto_class(source.config), _as_written(source), source.tensors)


def _sampled(path: Path) -> str:
    """Digest of a file's evenly spaced pieces, the first (its header) included."""
    digest = hashlib.sha256()
    size = path.stat().st_size
    with path.open("rb") as file:
        for i in range(_SAMPLES + 1):
            file.seek(max(0, size - _SAMPLE_BYTES) * i // _SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
