"""Results that a benchmark keeps a line a cell: those that are there, those that are missing, and one more.

A file is read anew whenever it is asked for, so a script that was stopped goes on with what is missing, and a cell may
depend on those before it.
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from common import high_water_mib, machine


def options(about: str | None) -> argparse.ArgumentParser:
    """The options of a script that does what is missing and writes its table."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="write the table of what is done, and do nothing more")
    return parser


def asked(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What the command line says, with the threads set and the scratch folder made."""
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if not given.report:
        given.scratch.mkdir(parents=True, exist_ok=True)
    return given


def stored(file: Path) -> list[dict[str, Any]]:
    """What is done; nothing where there is no file."""
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []


def missing(
    file: Path, keys: Sequence[str], cells: Iterable[tuple[Any, ...]], only: str = "*"
) -> Iterator[tuple[Any, ...]]:
    """The cells that no line has by the time they are reached, in order.

    Args:
        keys: what a cell is called by in its line, one for each of its values; a line without a key has None there.
        only: the cells whose values, joined by hyphens, fit this glob.
    """
    for cell in cells:
        known = {tuple(line.get(key) for key in keys) for line in stored(file)}
        if cell not in known and fnmatch("-".join(map(str, cell)), only):
            yield cell


def here() -> dict[str, Any]:
    """Where a line was measured, and the peak of memory until then."""
    return {
        "peak_mib": round(high_water_mib()),
        "machine": {key: value for key, value in machine().items() if key != "load_before"},
    }


def keep(file: Path, line: dict[str, Any], hidden: Sequence[str] = ()) -> None:
    """Add a line, and show it but for the machine and what is `hidden`."""
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(line) + "\n")
    left = {"machine", *hidden}
    print(json.dumps({key: value for key, value in line.items() if key not in left}), flush=True)
