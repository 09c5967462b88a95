"""Where a command's report goes: a JSON file that is written whole, and replaces nothing but another report."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from compresso.checkpoint.atomic import write_text
from compresso.checkpoint.folder import read_json
from compresso.checkpoint.overwrite import first_bytes
from compresso.checkpoint.places import without_places_in
from compresso.errors import CheckpointError
from compresso.metrics.record import Report


def report_path(output: str | Path, models: Iterable[Path | None] = ()) -> Path:
    """The file to write, if it can be; nothing is created.

    Args:
        output: asked for.
        models: folders of the measured models, which stay as they are.

    Raises:
        CheckpointError: a folder, a file that is no report, a place that cannot be written to, or one inside a model's
            folder.
    """
    path = Path(output).expanduser()
    if path.is_dir():
        raise CheckpointError(f"output {path} is a folder; a file is wanted, such as {path / 'report.json'}")
    parent = path.resolve().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise CheckpointError(
            f"output {path} cannot be written: {parent} is no folder that can be written to. Choose another output."
        )
    if any(folder is not None and parent.is_relative_to(folder.resolve()) for folder in models):
        raise CheckpointError(
            f"output {path} lies in the folder of a measured model, which stays as it is; choose another output"
        )
    if path.exists() and not _is_report(path):
        raise CheckpointError(f"output {path} exists and is no report of measurements; choose another output")
    return path


def _is_report(path: Path) -> bool:
    """Whether a file is a report, by its first bytes, and then by the whole of it. Raises CheckpointError if it is no
    file.
    """
    if not _BEGINNING.match(first_bytes(path)) or path.stat().st_size > _MOST_BYTES:
        return False
    try:
        Report.model_validate(read_json(path))
    except (CheckpointError, ValueError):
        return False
    return True


_BEGINNING = re.compile(rb"\s*\{\s*\"(format|created|models|subjects)\"")
_MOST_BYTES = 64_000_000


def write_report_file(path: Path, report: Report) -> None:
    """Write a report as JSON, whole or not at all.

    Raises:
        ResourceError: the disk is full.
    """
    kept = Report.model_validate(without_places_in(report.model_dump(mode="json")))
    write_text(path, kept.model_dump_json(indent=2) + "\n")
