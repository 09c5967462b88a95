"""What a recipe file may name as its data: a registered name, a hub id, or a file below the recipe's own folder or the
working folder.

A recipe is passed from hand to hand, and a run quotes its data in a report. So `~`, `..`, absolute paths, and links
that lead out of both folders are a person's to give, on the command line, and not a file's.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from compresso.data.registry import NAMES
from compresso.errors import RecipeError

_MAGIC = frozenset("*?[")


def source_of(raw: Mapping[str, Any]) -> object:
    """What a raw recipe names as its data; None if nothing."""
    data = raw.get("data")
    return data.get("source") if isinstance(data, Mapping) else None


def with_confined_data(raw: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The raw recipe of a file, with data that lies beside it named in full.

    Args:
        raw: what `file` holds.
        file: the recipe.

    Raises:
        RecipeError: it names data outside its folder and the working folder.
    """
    source = source_of(raw)
    if not isinstance(source, str):
        return dict(raw)
    roots = (file.expanduser().resolve().parent, Path.cwd())
    whole = any((root / source).is_file() for root in roots)  # a comma may belong to a file's name
    parts = [source] if whole else [part.strip() for part in source.split(",")]
    return {**raw, "data": {**raw["data"], "source": ",".join(_confined(part, roots, file.name) for part in parts)}}


def _confined(part: str, roots: tuple[Path, ...], recipe: str) -> str:
    """One source, in full where it lies beside the recipe alone. Raises RecipeError if it lies below neither folder."""
    cure = "A recipe names data below its own folder or the working folder; give others with --data."
    if not part.isprintable():
        raise RecipeError(f"recipe {recipe}: data.source {part[:80]!r} holds a character that no file name has. {cure}")
    steps = {*PurePosixPath(part).parts, *PureWindowsPath(part).parts}
    absolute = PurePosixPath(part).is_absolute() or bool(PureWindowsPath(part).anchor)
    if part.startswith("~") or ".." in steps or absolute:
        raise RecipeError(f"recipe {recipe}: data.source {part[:80]!r} leads out of the recipe's folder. {cure}")
    for root in roots:
        for found in _files(root, part):
            if not any(found.resolve().is_relative_to(one.resolve()) for one in roots):
                raise RecipeError(
                    f"recipe {recipe}: data.source {part[:80]!r} is a link that leads out of the recipe's folder."
                    f" {cure}"
                )
    found_beside = part not in NAMES and any(_files(roots[0], part)) and not any(_files(roots[1], part))
    return str(roots[0] / part) if found_beside else part


def _files(root: Path, part: str) -> Iterator[Path]:
    """What a source stands for below a root: a file, what lies in a folder, or what a pattern fits."""
    found = list(root.glob(part)) if _MAGIC & set(part) else [root / part]
    for path in found:
        if os.path.lexists(path):
            yield path
            if path.is_dir():
                yield from path.rglob("*")
