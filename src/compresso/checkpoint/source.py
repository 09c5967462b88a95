"""Opening a model: everything that can be wrong is found before its weights are read.

`open_source` looks at names, sizes, links, the config and the safetensors headers, and compares these with what the
architecture expects, on the meta device. Only `load_model` in load.py reads weights.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from transformers import PreTrainedConfig

from compresso.checkpoint import hub
from compresso.checkpoint.atomic import sha256
from compresso.checkpoint.bounds import check_layers
from compresso.checkpoint.code import refuse_code, refuse_fields
from compresso.checkpoint.folder import (
    check_folder,
    check_generation_config,
    lie_beside,
    read_config,
    read_json,
    stored_names,
    stored_tensors,
)
from compresso.checkpoint.gguf_folder import describe_gguf, is_gguf, only_gguf
from compresso.checkpoint.header import TensorInfo
from compresso.checkpoint.kinds import auto_class
from compresso.checkpoint.links import check_links
from compresso.checkpoint.meta import as_written
from compresso.checkpoint.stages import check_stages_
from compresso.checkpoint.tensors import HEADS, check_tensors, untied_as_stored
from compresso.errors import CheckpointError

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
    With `packed=True` they may be stored in few bits or factored, for those who run a model and change nothing in it.

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


def _open_file(path: Path, weights: bool, packed: bool) -> Source:
    """A model that is one file."""
    if path.suffix == ".json":
        config = read_config(path, packed)
        refuse_fields(path, read_json(path))
        check_stages_(config, path.resolve().parent)
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
        wanted = {
            name: tuple(one.shape) for name, one in as_written(source.config, source.config_file).state_dict().items()
        }
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
    check_stages_(config, folder)
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
        model = as_written(source.config, source.config_file)
        if untied_as_stored(source.config, model, source.folder, stored):
            source.config.tie_word_embeddings = False


def _check_tensors(source: Source) -> None:
    """Raise CheckpointError if the folder's tensors are not its model's. Its config is told if they untie the head."""
    _untie_as_stored_(source, source.tensors)
    assert source.folder is not None  # weights lie in one
    check_tensors(
        source.folder,
        source.config,
        auto_class(source.config),
        as_written(source.config, source.config_file),
        source.tensors,
    )


def unfit_weights(source: Source) -> str | None:
    """Why a run refuses the weights that lie in the folder of a config, by their headers; None where it does not, and
    where there are none.

    Args:
        source: opened without them.
    """
    folder = source.config_file.parent
    if source.kind != "folder" or not lie_beside(folder):
        return None
    try:
        _check_tensors(replace(source, tensors=stored_tensors(folder)))
    except CheckpointError as error:
        return str(error)
    return None


def _sampled(path: Path) -> str:
    """Digest of a file's evenly spaced pieces, the first (its header) included."""
    digest = hashlib.sha256()
    size = path.stat().st_size
    with path.open("rb") as file:
        for i in range(_SAMPLES + 1):
            file.seek(max(0, size - _SAMPLE_BYTES) * i // _SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
