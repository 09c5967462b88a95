"""Rows of a file that somebody else wrote, read strictly: what is not as it is wanted is one line that names the file,
the row, the field, the value and what was wanted.

Nothing is converted but a whole number to its digits, so that no label becomes another one unsaid.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from compresso.core import strict_json
from compresso.core.plain_values import whole_number
from compresso.data.lines import decoded_lines, whole_text
from compresso.errors import DataError

CURE = "repair it, or put the published file in its place"
TEXT = "a text that is not empty"


@dataclass(frozen=True)
class Row:
    """One row.

    Args:
        where: its file and place, for errors.
        fields: by name.
    """

    where: str
    fields: Mapping[str, Any]

    def refuse(self, field: str, wanted: str) -> NoReturn:
        """Raise DataError for what stands in a field, or that it is not there."""
        if field not in self.fields:
            raise DataError(f"{self.where}: no {field}; wanted {wanted}; {CURE}")
        raise DataError(f"{self.where}: {field} is {shown(self.fields[field])}; wanted {wanted}; {CURE}")

    def text(self, field: str) -> str:
        """A text that is not empty. Raises DataError."""
        value = self.fields.get(field)
        if not isinstance(value, str) or not value.strip():
            self.refuse(field, TEXT)
        return value

    def name(self, field: str) -> str:
        """A text that may be part of a question's id. Raises DataError."""
        value = self.text(field)
        if "#" in value or not value.isprintable():
            self.refuse(field, "a name without '#' and line breaks")
        return value

    def label(self, field: str, values: Sequence[str], case: bool = True) -> int:
        """The place of a label among the given ones, which a whole number may stand for.

        Args:
            field: by name.
            values: that it may have.
            case: False where capitals do not matter.

        Raises:
            DataError: another one, or something that is neither text nor whole number.
        """
        value = self.fields.get(field)
        number = whole_number(value)
        said = value if isinstance(value, str) else None if number is None else str(number)
        if said is not None and not case:
            said = said.lower()
        if said is None or said not in values:
            self.refuse(field, " or ".join(values) if len(values) <= 5 else f"{values[0]} to {values[-1]}")
        return values.index(said)

    def choices(self, field: str) -> tuple[str, ...]:
        """Two texts or more of which no two are the same but for capitals. Raises DataError."""
        value = self.fields.get(field)
        if not isinstance(value, list) or not all(isinstance(one, str) and one.strip() for one in value):
            self.refuse(field, "a list of texts")
        if len(value) < 2 or len({one.strip().lower() for one in value}) < len(value):
            self.refuse(field, "a list of at least two texts that differ")
        return tuple(value)

    def pairs(self, field: str, labels: Sequence[str]) -> tuple[tuple[str, str], ...]:
        """Pairs of a text and one of some labels, whose capitals do not matter; perhaps none. Raises DataError."""
        value = self.fields.get(field)
        if not isinstance(value, list):
            self.refuse(field, "a list of [text, label]")
        found: list[tuple[str, str]] = []
        for number, one in enumerate(value, 1):
            if not isinstance(one, list) or len(one) != 2:
                raise DataError(f"{self.where}: pair {number} of {field} is {shown(one)}; wanted [text, label]; {CURE}")
            row = Row(f"{self.where}, pair {number} of {field}", {"text": one[0], "label": one[1]})
            found.append((row.text("text"), labels[row.label("label", labels, case=False)]))
        return tuple(found)


def shown(value: Any) -> str:
    """A value as JSON, cut short."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def json_lines(path: Path) -> list[Row]:
    """The objects of a file of JSON lines. Raises DataError naming the line; also where there is none."""
    rows: list[Row] = []
    for number, line, fault in decoded_lines(path):
        where = f"{path.name} line {number}"
        if fault:
            raise DataError(f"{where}: {fault}; {CURE}")
        if not line.strip():
            continue
        try:
            value = strict_json.loads(line.strip())
        except ValueError as error:
            raise DataError(f"{where}: no JSON: {error}; {CURE}") from error
        rows.append(_row(where, value))
    if not rows:
        raise DataError(f"{path.name}: holds no row; {CURE}")
    return rows


def json_value(path: Path) -> Any:
    """The value of a JSON file in which no key stands twice. Raises DataError."""
    try:
        return strict_json.loads(whole_text(path))
    except ValueError as error:
        raise DataError(f"{path.name}: no JSON: {error}; {CURE}") from error


def named_rows(where: str, value: Any) -> dict[str, list[Row]]:
    """The rows of {NAME: [row, ...]}.

    Args:
        where: the file, and the place of the value in it.
        value: from JSON.

    Raises:
        DataError: no such mapping, no name, or no row under one.
    """
    if not isinstance(value, dict) or not value:
        raise DataError(f"{where} is {shown(value)}; wanted {{NAME: [row, ...]}}; {CURE}")
    found: dict[str, list[Row]] = {}
    for name, rows in value.items():
        Row(where, {"a name": name}).name("a name")
        if not isinstance(rows, list) or not rows:
            raise DataError(f"{where}: {name} is {shown(rows)}; wanted a list of rows; {CURE}")
        found[name] = [_row(f"{where}, {name}, row {number}", one) for number, one in enumerate(rows, 1)]
    return found


def table(path: Path, *columns: str) -> list[Row]:
    """The rows of a CSV file with a head.

    Raises:
        DataError: without these columns, without a row, or with a row of fewer or more cells than the head has; names
            the line that the row begins in.
    """
    reader = csv.reader(io.StringIO(whole_text(path), newline=""), strict=True)
    head, rows, begins = list[str](), list[Row](), 1
    try:
        for cells in reader:
            where, begins = f"{path.name} line {begins}", reader.line_num + 1
            if not cells:
                continue
            if not head:
                head = cells
                if not set(columns) <= set(head) or len(set(head)) < len(head):
                    wanted = f"the columns {', '.join(columns)}, each once"
                    raise DataError(f"{where}: the head is {shown(','.join(head))}; wanted {wanted}; {CURE}")
                continue
            if len(cells) != len(head):
                raise DataError(f"{where}: cells: {len(cells)}; wanted {len(head)}, as in the head; {CURE}")
            rows.append(Row(where, dict(zip(head, cells, strict=True))))
    except csv.Error as error:
        raise DataError(f"{path.name} line {begins}: no CSV: {error}; {CURE}") from error
    if not rows:
        wanted = "rows under it" if head else f"a table with the columns {', '.join(columns)}"
        raise DataError(f"{path.name}: {'the head stands alone' if head else 'it is empty'}; wanted {wanted}; {CURE}")
    return rows


def _row(where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where} is {shown(value)}; wanted an object with named fields; {CURE}")
    return Row(where, value)
