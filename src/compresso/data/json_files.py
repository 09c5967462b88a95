"""JSON files taken apart: an object a line, a list of objects, or one object with a list in it. What is found has its
line; what no JSON is has a reason.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from compresso.core import strict_json
from compresso.data.found import Found
from compresso.data.lines import decoded_lines, opened, whole_text
from compresso.errors import DataError, first_line


def json_lines(path: Path) -> Iterator[Found]:
    """What each line holds, and why a line is no JSON."""
    for number, line, wrong in decoded_lines(path):
        place = f"{path}:{number}"
        if wrong:
            yield Found(place, wrong=wrong)
        elif line.strip():
            try:
                yield Found(place, json.loads(line))
            except json.JSONDecodeError as error:
                yield Found(place, wrong=f"bad JSON at character {error.pos + 1} ({strict_json.words(error)})")
            except (ValueError, RecursionError) as error:
                yield Found(place, wrong=f"bad JSON ({first_line(error)})")


def begins(path: Path, sign: str) -> bool:
    """Whether a file's first sign that is no space is this one."""
    with opened(path) as stream:
        return stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(sign.encode())


def one_object(path: Path, columns: Collection[str]) -> Mapping[object, object] | None:
    """The object that a whole file is, if it lists something under "data", or should, as it has none of a row's
    columns; None if it is something else, such as an object a line. Raises DataError if it is too large or no JSON.
    """
    text = whole_text(path)
    try:
        value, end = json.JSONDecoder().raw_decode(text, _skip_space(text, 0))
    except json.JSONDecodeError as error:
        if error.lineno == 1 and "\n" in text.strip():
            return None  # a bad line among others
        where = f"{path}:{error.lineno}"
        raise DataError(
            f"{where}: bad JSON at character {error.colno} ({strict_json.words(error)}); repair it"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: bad JSON ({first_line(error)}); repair the file") from error
    alone = _skip_space(text, end) == len(text)
    if not alone or not isinstance(value, dict) or "data" not in value:
        return None
    return value if isinstance(value["data"], list) or not value.keys() & set(columns) else None


def json_list(path: Path) -> Iterator[Found]:
    """Elements one by one, so that each has its line; a syntax error ends the file, because what follows it has no
    certain beginning.
    """
    lines: list[str] = []
    for number, line, wrong in decoded_lines(path):
        if wrong:
            raise DataError(f"{path}:{number}: {wrong}; repair the line")
        lines.append(line)
    text = "".join(lines)
    decoder = json.JSONDecoder()
    place, line_number = _skip_space(text, 0), 1
    counted = 0
    place = _skip_space(text, place + 1)
    first = True
    while True:
        line_number += text.count("\n", counted, place)
        counted = place
        where = f"{path}:{line_number}"
        if text[place : place + 1] == "]" and first:
            return
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            said = strict_json.words(error) if isinstance(error, json.JSONDecodeError) else first_line(error)
            raise DataError(f"{where}: bad JSON ({said}); repair the file") from error
        yield Found(where, value)
        first = False
        place = _skip_space(text, place)
        if text[place : place + 1] == "]":
            return
        if text[place : place + 1] != ",":
            raise DataError(
                f"{path}:{line_number + text.count(chr(10), counted, place)}: bad JSON (wanted ',' or ']'); repair the"
                " file"
            )
        place = _skip_space(text, place + 1)


def _skip_space(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n\ufeff":
        place += 1
    return place
