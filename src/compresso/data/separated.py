"""Rows of text tables under a header line: .csv by RFC 4180, .tsv by whichever of two customs the file follows.

GLUE, MRPC and most data sets of sentences separate by tabs and quote nothing: a quotation mark is a letter. pandas and
spreadsheets quote fields that hold a tab, a line break or a quotation mark, and double those within. Read by the other
custom, the first kind loses rows: a field that begins with a quotation mark runs on to the next one, lines further
down. So a .tsv is taken as unquoted where each of its lines has as many fields as the header, two or more, and as
quoted only where that does not hold and quoting leaves no bad line; in both a field in marks with doubled marks within
is unquoted.

Of a .csv with bad quoting one line is bad, and reading goes on with the next: nothing is swallowed on the way to the
next quotation mark.
"""

import csv
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from compresso.data.lines import MAX_LINE_BYTES, decoded_lines
from compresso.data.record_forms import RecordForm, printable
from compresso.data.tables import TableRow, divided
from compresso.errors import DataError

_MARK = '"'


def comma_rows(path: Path, form: RecordForm) -> Iterator[TableRow]:
    """Rows of a .csv file.

    Raises:
        DataError: the header names a column twice or none that means something, or a line is no text.
    """
    return _rows(path, _quoted(path, ","), form)


def tab_rows(path: Path, form: RecordForm) -> Iterator[TableRow]:
    """Rows of a .tsv file.

    Raises:
        DataError: the header names a column twice or none that means something, or a line is no text.
    """
    plain = _columns(_unquoted(path)) > 1 or not _columns(_quoted(path, "\t"))
    return _rows(path, _unquoted(path) if plain else _quoted(path, "\t"), form)


def _rows(path: Path, found: Iterator[tuple[int, list[str], str]], form: RecordForm) -> Iterator[TableRow]:
    """Rows of a table by columns; the first line is the header."""
    header: list[str] | None = None
    for number, fields, wrong in found:
        place = f"{path}:{number}"
        if header is None:
            if wrong:
                raise DataError(f"{place}: {wrong}; repair the header line")
            header = _header(path, fields, form)
        elif wrong:
            yield TableRow(place, {}, wrong)
        elif len(fields) == len(header):
            yield TableRow(place, dict(zip(header, fields, strict=True)))
        elif fields:
            yield TableRow(place, {}, f"has {len(fields)} fields, the header {len(header)}")


def _columns(found: Iterator[tuple[int, list[str], str]]) -> int:
    """How many fields all lines of a table have; 0 where they have not as many, or one is bad."""
    wanted = 0
    for _, fields, wrong in found:
        wanted = wanted or len(fields)
        if wrong or (fields and len(fields) != wanted):
            return 0
    return wanted


def _unquoted(path: Path) -> Iterator[tuple[int, list[str], str]]:
    """Line number, fields and what is wrong of each line of a .tsv file, quotation marks being letters."""
    quoted_header = False
    for number, line in _text_lines(path):
        text = line.rstrip("\r\n")
        fields = text.split("\t") if text else []
        quoted_header = quoted_header or (number == 1 and all(map(_marked, fields)))
        yield number, [_bare(field) if quoted_header or _doubled(field) else field for field in fields], ""


def _marked(field: str) -> bool:
    return len(field) >= 2 and field[0] == field[-1] == _MARK and _MARK not in field[1:-1].replace(2 * _MARK, "")


def _doubled(field: str) -> bool:
    """Whether a field can only be one that was quoted for the marks in it."""
    return 2 * _MARK in field[1:-1] and _marked(field)


def _bare(field: str) -> str:
    return field[1:-1].replace(2 * _MARK, _MARK) if _marked(field) else field


def _quoted(path: Path, delimiter: str) -> Iterator[tuple[int, list[str], str]]:
    """Line number, fields and what is wrong of each row, where fields may be quoted and go on over lines."""
    lines = _Again(_text_lines(path))
    while True:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            with _wide_fields():
                fields = next(reader, None)
        except csv.Error as error:
            number = lines.retry()
            told = str(error).replace("'\t'", "a tab")
            yield number, [], f"bad quoting ({told})"
            continue
        if fields is None:
            return
        yield lines.done(), fields, ""


class _Again:
    """Numbered lines, of which those behind the first of a bad row are read anew.

    Args:
        lines: numbers and texts.
    """

    def __init__(self, lines: Iterator[tuple[int, str]]) -> None:
        self._lines, self._taken, self._waiting = lines, list[tuple[int, str]](), deque[tuple[int, str]]()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self._taken.append(self._waiting.popleft() if self._waiting else next(self._lines))
        return self._taken[-1][1]

    def done(self) -> int:
        """The number of the row's first line; what comes next is another row's."""
        number = self._taken[0][0]
        self._taken.clear()
        return number

    def retry(self) -> int:
        """The same, and the row's other lines come again."""
        self._waiting.extendleft(reversed(self._taken[1:]))
        return self.done()


def _header(path: Path, fields: Sequence[str], form: RecordForm) -> list[str]:
    names = [name.strip() for name in fields]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"{path}:1: the header names the column '{printable(twice)}' twice; rename one")
    divided(path, names, form)
    return names


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line, wrong in decoded_lines(path):
        if wrong:
            raise DataError(f"{path}:{number}: {wrong}; repair the line")
        yield number, line


@contextmanager
def _wide_fields() -> Iterator[None]:
    """Let a cell be as long as a line may be: the csv module's own limit is less than a long document."""
    before = csv.field_size_limit(MAX_LINE_BYTES)
    try:
        yield
    finally:
        csv.field_size_limit(before)
