"""The files of the published evaluations, in a folder that the user has: compresso ships none of them."""

import csv
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compresso.core import strict_json
from compresso.data.lines import whole_text
from compresso.errors import DataError

FOLDER = Path("datasets") / "trust" / "decodingtrust"
"""Below the folder that --data-root or COMPRESSO_DATA names."""


class Missing(Exception):
    """Why a dimension, or a part of it, is not measured: no error, but said."""


@dataclass(frozen=True)
class TrustData:
    """Where the files lie.

    Args:
        root: the folder of local data; None for none.
    """

    root: Path | None = None

    @property
    def folder(self) -> Path | None:
        """Where the files of DecodingTrust are looked for."""
        return None if self.root is None else self.root / FOLDER

    def find(self, pattern: str) -> list[Path]:
        """The files whose names match a regular expression, sorted."""
        folder = self.folder
        if folder is None or not folder.is_dir():
            return []
        return sorted(path for path in folder.iterdir() if re.fullmatch(pattern, path.name))

    def all(self, pattern: str, what: str) -> list[Path]:
        """As `find`. Raises Missing, saying `what` is not there, if nothing matches."""
        if found := self.find(pattern):
            return found
        if self.root is None:
            raise Missing(f"{what}: no folder of local data was named (--data-root or COMPRESSO_DATA)")
        raise Missing(f"{what}: no such file in {FOLDER} of the data folder")


def json_lines(path: Path, *keys: str) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines. Raises DataError naming the line, also of one without these keys."""
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(whole_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = strict_json.loads(line)
        except ValueError as error:
            raise DataError(f"{path.name} line {number}: no JSON: {error}") from error
        if not isinstance(value, dict) or not all(key in value for key in keys):
            raise DataError(f"{path.name} line {number}: wanted an object with {', '.join(keys)}")
        rows.append(value)
    return rows


def json_value(path: Path) -> Any:
    """The value of a JSON file. Raises DataError."""
    try:
        return json.loads(whole_text(path))
    except ValueError as error:
        raise DataError(f"{path.name}: no JSON: {error}") from error


def table(path: Path, *columns: str) -> list[dict[str, str]]:
    """The rows of a CSV file with a head. Raises DataError for one without these columns."""
    rows = list(csv.DictReader(io.StringIO(whole_text(path))))
    if not rows or not all(column in rows[0] for column in columns):
        raise DataError(f"{path.name}: wanted a table with the columns {', '.join(columns)}")
    return rows
