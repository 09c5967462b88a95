"""In which engines a checkpoint opens, and whether it computes there what it computes here.

The folder's own code runs only if it is, byte for byte, the file that compresso writes (`checkpoint/code.py`). What is
there but could not be run is called "not checked", not "yes".
"""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from compresso.checkpoint.folder import read_json
from compresso.checkpoint.kinds import is_causal, is_text_encoder, sees
from compresso.checkpoint.load import numbers_of
from compresso.checkpoint.patched import patch_names, stored_patches
from compresso.checkpoint.places import without_places
from compresso.checkpoint.scratch import check_scratch, scratch_folder
from compresso.checkpoint.source import Source, open_source
from compresso.door import public
from compresso.edit.patches import patch_
from compresso.engines import registry
from compresso.engines.context import UNGATED, context_parity
from compresso.engines.encoder import verify_encoder
from compresso.engines.parity import Engine, Format, Parity, Reference
from compresso.engines.transformers import OWN, PACKED, PLAIN, REMOTE
from compresso.engines.written import Live, load_for, missing_writer, write
from compresso.errors import CheckpointError, CompressoError
from compresso.formats.sliced import is_cut
from compresso.metrics.pruned_context import has_gates
from compresso.native import PATCHED_FILE
from compresso.sweep.memory import available
from compresso.training.progress import Progress


@public
def verify(model: str | Path) -> list[Parity]:
    """The parity of every engine with a hub id, a folder of safetensors or a GGUF file; of a model whose context is
    pruned first whether token by token it says what its masked forward says.

    Raises CheckpointError if it is neither a causal language model nor an encoder of texts with a head, or cannot be
    read; ResourceError if memory is short.
    """
    source = open_source(model, packed=True)
    check_scratch()
    with_head = is_causal(source.config) or is_text_encoder(source.config) or sees(source.config)
    if source.folder is None:
        raise CheckpointError(f"{source.name} has no weights to verify. Give a folder of safetensors or a GGUF file.")
    if not with_head:
        raise CheckpointError(
            f"{source.name} ({source.config.model_type}) has no head, and engines are compared by the logits that one"
            " gives. Give the result of a run with --task, which makes the head that a base model lacks."
        )
    if not is_causal(source.config):
        with scratch_folder() as scratch:
            return _told(verify_encoder(source, scratch), source, False)
    with Progress().working("reading the model"):
        live = load_for(Format.CHECKPOINT, source)
        reference = live.reference()
        patched = _patched(live, source)
    found: dict[str, Parity] = {}
    with scratch_folder() as scratch:
        for written, engines in groupby(registry.engines(), lambda engine: engine.reads):
            due = [engine for engine in engines if _due(engine, found)]
            patching = [engine for engine in due if engine is REMOTE and patched is not None]
            plain = [engine for engine in due if engine not in patching]
            found |= {one.engine: one for one in parities(written, plain, source, reference, scratch)}
            found |= {one.engine: one for one in parities(written, patching, source, patched or reference, scratch)}
    told = _told(found.values(), source, patched is not None)
    if not has_gates(source):
        return told
    with Progress().working("decoding through the cache that frees"):
        return [context_parity(source), *told]


def _patched(live: Live, source: Source) -> Reference | None:
    """What the model computes with the forward patches of its records, where the class file beside its weights puts
    them on; None where no class file does, or there are none.
    """
    own = read_json(source.config_file).get("auto_map")
    if (
        not isinstance(own, dict)
        or not any(PATCHED_FILE.stem in str(one) for one in own.values())
        or is_cut(source.folder)
    ):
        return None
    patch_(live.model, stored_patches(source))
    return live.reference()


def _told(found: Iterable[Parity], source: Source, patched: bool) -> list[Parity]:
    """What engines computed, where it is less than what `compresso.load` opens: its forward patches are not there.
    Folders with packed weights say themselves how activations are rounded, and a class file may put patches on.

    patched: whether the folder's own code does.
    """
    names = ", ".join(patch_names(source))
    alone = UNGATED if has_gates(source) else f"by its weights alone: {names} is what compresso.load adds"
    reasons = {PACKED.name: "", REMOTE.name: f"with {names}, by its own code" if patched else alone}
    return [
        replace(one, reason=reason)
        if names and one.opens == "yes" and (reason := reasons.get(one.engine, alone))
        else one
        for one in found
    ]


def _due(engine: Engine, found: Mapping[str, Parity]) -> bool:
    """Whether an engine is to be run after what others said."""
    before = engine.listed.instead_of
    return before is None or (before in found and found[before].opens == "no")


def parities(
    written: Format, engines: Sequence[Engine], source: Source, reference: Reference, scratch: Path
) -> list[Parity]:
    """Write one format, compare the engines that read it, and remove what was written.

    Args:
        written: the format.
        engines: that read it.
        source: a folder.
        reference: of the model in it.
        scratch: where to write.

    Returns:
        One of each engine, but of those that are not listed where they could not be run.
    """
    lacking = {engine.name: missing_writer(written) or engine.missing() for engine in engines}
    found = {name: Parity(name, "not installed", reason) for name, reason in lacking.items() if reason is not None}
    if here := [engine for engine in engines if lacking[engine.name] is None]:
        found |= {one.engine: one for one in _compared(written, here, source, reference, scratch)}
    said = ("yes", "no")
    return [found[engine.name] for engine in engines if engine.listed.if_absent or found[engine.name].opens in said]


def _compared(
    written: Format, engines: Sequence[Engine], source: Source, reference: Reference, scratch: Path
) -> list[Parity]:
    """As `parities`, of engines that can be run here."""
    assert source.folder is not None
    if written is Format.CHECKPOINT and is_cut(source.folder):
        reason = "it would compute the dense model: compresso.load cuts the stream, and an export as sliced is narrower"
        return [Parity(engine.name, "no", reason) for engine in engines]
    if written is Format.CHECKPOINT:
        return [_asked(engine, source.folder, reference) for engine in engines]
    path = scratch / written
    try:
        model = load_for(written, source)
    except CompressoError as error:
        return [Parity(engine.name, "not checked", str(error)) for engine in engines]
    try:
        with Progress().working(f"writing {written}"):
            write(written, model, path)
    except CompressoError as error:
        return [Parity(engine.name, "no", str(error)) for engine in engines]
    if model.own_reference:
        reference = model.reference()
    del model  # an engine needs memory for its own
    try:
        return [_asked(engine, path, reference) for engine in engines]
    finally:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _asked(engine: Engine, path: Path, reference: Reference) -> Parity:
    """What an engine makes of what was written, with a sign of life while it opens it."""
    with Progress().working(f"asking {engine.name}"):
        return engine.parity(path, reference)


def parity_records(folder: Path) -> list[dict[str, Any]]:
    """What `verify` finds of a written folder, for its records; where memory does not suffice, that."""
    size = 4 * numbers_of(open_source(folder))
    if 2.2 * size > (there := available(torch.device("cpu"))):
        reason = (
            f"two copies in float32 need {2 * size / 1e9:.1f} GB, and {there / 1e9:.1f} GB are there; compresso verify"
            " asks elsewhere"
        )
        return [asdict(Parity(engine.name, "not checked", reason)) for engine in (PLAIN, OWN, REMOTE)]
    return [asdict(one) | {"reason": without_places(one.reason)} for one in verify(folder)]
