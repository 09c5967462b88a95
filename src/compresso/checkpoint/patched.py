"""The forward patches that a written folder names: what `compresso.load` adds to its weights, and nothing else does."""

from collections.abc import Mapping
from typing import Any

from compresso.checkpoint.folder import read_json
from compresso.checkpoint.source import Source
from compresso.edit.patch import Patch
from compresso.edit.patches import Written, read_patches
from compresso.errors import CheckpointError

RECORDS = "records.json"


def stored_patches(source: Source) -> tuple[Patch, ...]:
    """The patches of a model's records, in the order of application; none where it has no records.

    Raises:
        ArchError: one is unknown.
        CheckpointError: a tensor of one is missing.
    """
    return read_patches(written_patches(source), source.folder)


def patch_names(source: Source) -> tuple[str, ...]:
    """What they are called, each once."""
    names = [one.partition(" ")[0] if isinstance(one, str) else str(one.get("name")) for one in written_patches(source)]
    return tuple(dict.fromkeys(names))


def written_patches(source: Source) -> list[Written]:
    """The patches as records hold them. Raises CheckpointError for records that cannot be read or hold no list."""
    found = _records(source).get("patches", [])
    if not isinstance(found, list) or not all(isinstance(one, str | Mapping) for one in found):
        raise CheckpointError(
            f"{source.name}: patches in records.json are no list of forward patches; copy the whole folder again"
        )
    return found


def columns_read(source: Source) -> tuple[str, ...]:
    """The columns of data that the run behind a model made its examples of; none where that is not known."""
    try:
        data = _records(source).get("data")
    except CheckpointError:  # of whoever wrote them: they decide nothing
        return ()
    columns = data.get("columns") if isinstance(data, dict) else None
    return tuple(map(str, columns)) if isinstance(columns, dict | list) else ()


def weights_alone(source: Source) -> list[str]:
    """What a run does not take over of a model that another run wrote, a sentence; nothing for most, and where records
    cannot be read, which decide nothing here.
    """
    try:
        names = patch_names(source)
    except CheckpointError:
        return []
    adds = f"{source.name}: a run starts from its weights alone, without what compresso.load adds: {', '.join(names)}"
    return [adds] if names else []


def _records(source: Source) -> dict[str, Any]:
    """What the run behind a model recorded; nothing for most models. Raises CheckpointError."""
    path = None if source.folder is None else source.folder / RECORDS
    return read_json(path) if path is not None and path.is_file() else {}
