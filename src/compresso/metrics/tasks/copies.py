"""Local files in place of data sets on the hub: the harness's own YAML, with nothing changed but where the rows come
from.

A generated YAML includes that of the harness, so prompts, metrics, shots and their wording stay the harness's. It
changes `custom_dataset` (which of our functions reads the rows), `dataset_kwargs` (which files) and the names of the
splits that are there. Files hold rows in the form they have on the hub, but for those of race.
"""

import gzip
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from compresso.checkpoint.atomic import sha256
from compresso.data.lines import decoded_lines
from compresso.errors import DataError

if TYPE_CHECKING:
    from datasets import DatasetDict

FOLDER = Path("datasets") / "bench"
"""Where the files lie below the data root."""
_SPLITS = {"train": "training_split", "validation": "validation_split", "test": "test_split", "dev": "fewshot_split"}
Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Copy:
    """Local files that stand in for a data set.

    Args:
        files: split -> file name below `datasets/bench`.
        fields: what every row must have.
        remark: which part of the split the file holds, and how it differs from the hub's.
        where: a column and the value that rows of this task have in it; None if all rows are the task's.
        layout: "race" if a row must be put into the hub's form first.
    """

    files: Mapping[str, str]
    fields: tuple[str, ...]
    remark: str
    where: tuple[str, str] | None = None
    layout: Literal["hub", "race"] = "hub"

    def paths(self, root: Path) -> dict[str, Path]:
        """Split -> file."""
        return {split: root / FOLDER / name for split, name in self.files.items()}

    def missing(self, root: Path) -> Path | None:
        """The first file that is not there, or None."""
        return next((path for path in self.paths(root).values() if not path.is_file()), None)

    def settings(self, root: Path) -> dict[str, Any]:
        """What a YAML that reads these files says otherwise than the harness's."""
        splits: dict[str, Any] = {setting: split if split in self.files else None for split, setting in _SPLITS.items()}
        if "dev" not in self.files:
            del splits["fewshot_split"]  # few-shot examples may stand in the YAML
        return {
            "dataset_kwargs": {
                "files": {split: str(path) for split, path in self.paths(root).items()},
                "fields": list(self.fields),
                "where": list(self.where) if self.where else None,
                "layout": self.layout,
            },
            **splits,
        }

    def provenance(self, root: Path) -> dict[str, str]:
        """File names with the beginning of their sha256, and the remark: what a protocol says of the data."""
        named = [f"{path.name} {_digest(path, *_state(path))[:12]}" for path in self.paths(root).values()]
        return {"data": f"local {', '.join(named)}", "data_remark": self.remark}


def config(original: Path, changes: Mapping[str, Any], local: bool) -> str:
    """The text of a YAML that includes `original` and makes `changes`;
    `local` if the rows come from `dataset` below.
    """
    rows = f"custom_dataset: !function {__name__}.{dataset.__name__}\n" if local else ""
    return rows + yaml.safe_dump({"include": str(original), **changes}, sort_keys=False, allow_unicode=True)


def dataset(
    files: Mapping[str, str],
    fields: list[str],
    where: tuple[str, str] | None,
    layout: str,
    **_metadata: object,
) -> "DatasetDict":
    """The splits of a task, read from local files; called by the harness, which adds the metadata of the task's YAML.

    Raises:
        DataError: a file is missing, malformed (with the line), lacks a field, or has no row for the task.
    """
    from datasets import Dataset, DatasetDict

    splits = {}
    for split, name in files.items():
        path = Path(name)
        rows = [row for row in _rows(path, *_state(path)) if where is None or row.get(where[0]) == where[1]]
        if not rows:
            raise DataError(f"{path}: no row{f' with {where[0]}={where[1]!r}' if where else ''}; fetch the file again")
        for number, row in enumerate(rows, 1):
            if absent := [field for field in fields if field not in row]:
                raise DataError(
                    f"{path}: row {number}{f' of {where[1]}' if where else ''} lacks {', '.join(absent)}; fetch the"
                    " file again"
                )
        splits[split] = Dataset.from_list([_race(row) for row in rows] if layout == "race" else rows)
    return DatasetDict(splits)


def _race(row: dict[str, Any]) -> dict[str, Any]:
    """One question in the hub's form: an article with the text of a Python list of problems."""
    return {
        "article": row["article"],
        "problems": repr([{field: row[field] for field in ("question", "answer", "options")}]),
    }


def _state(path: Path) -> tuple[int, int]:
    """What changes when a file is written anew, so that what was read of it is read again."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; give the right --data-root")
    found = path.stat()
    return found.st_mtime_ns, found.st_size


@lru_cache(maxsize=4)
def _rows(path: Path, _modified: int, _size: int) -> Rows:
    """All rows of a file; mmlu and bbh ask for the same one many times."""
    rows: Rows = []
    try:
        for number, line, wrong in decoded_lines(path):
            if not wrong and not line.strip():
                continue
            try:
                value = json.loads(line) if not wrong else None
            except ValueError as error:
                wrong = f"not JSON ({error})"
                value = None
            if not isinstance(value, dict):
                raise DataError(f"{path}:{number}: {wrong or 'not a JSON object'}; fetch the file again")
            rows.append(value)
    except (gzip.BadGzipFile, EOFError, zlib.error, OSError) as error:
        raise DataError(f"{path}: cannot be read ({error}); fetch the file again") from error
    return rows


@lru_cache(maxsize=64)
def _digest(path: Path, _modified: int, _size: int) -> str:
    return sha256(path)
