"""A budget of milliseconds and of memory for a model of pictures: how large a share of it meets both, by the table that
`compresso latency` wrote of it on this machine (`core/picture_table.py`).

The share is the recipe's own `keep`: the largest, in hundredths, whose network can be written (MobileViT's config has
one ratio for all of its residuals) and has no more multiply-accumulates than the table allows. It stands in the recipe,
so that a resumed run has the same one.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from compresso.arch.base import arch_for
from compresso.checkpoint.kinds import of_pictures
from compresso.checkpoint.load import meta_model
from compresso.checkpoint.source import Source, open_source
from compresso.core import strict_json
from compresso.core.cost import Group
from compresso.core.cost_table import Field
from compresso.core.picture import that_sees
from compresso.core.picture_table import PictureTable, Quantity
from compresso.errors import BudgetError, ExportError
from compresso.runner.measured_budget import MOST_BYTES, machine_here
from compresso.runner.recipe import task_of, with_knob

_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?)B?\s*", re.IGNORECASE)
_CURE = "`compresso latency MODEL --output FILE` writes one"


def memory_bytes(text: str) -> float:
    """A size: "3.7GB", "500M", "3700000000".

    >>> memory_bytes("3.7GB")
    3700000000.0

    Raises:
        BudgetError: if it is none.
    """
    found = _SIZE.fullmatch(text)
    value = float(found[1]) * _UNITS[found[2].upper()] if found else math.nan
    if not (math.isfinite(value) and value > 0):
        raise BudgetError(f"--memory {text!r}: wanted a positive number of bytes, such as 3.7GB or 500MB")
    return value


def picture_facts(source: Source, task: str) -> dict[str, Field]:
    """What a table is compared by. task: by whose head the model is measured."""
    shaped = meta_model(source)
    arch = arch_for(shaped.config)
    size = that_sees(source.config).image_size
    inside = sum(math.prod(weight.shape) for weight in arch.weights(shaped) if weight.group == Group.BLOCKS)
    return {
        "model_type": str(source.config.model_type),
        "image_size": str(size if isinstance(size, int) else "x".join(map(str, size))),
        "block_parameters": inside,
        "task": task,
    }


def read_picture_table(path: str | Path, source: Source, task: str) -> PictureTable:
    """The table in a file. Raises BudgetError for none, and for one of another model or machine."""
    file = Path(path).expanduser()
    try:
        if not file.is_file() or file.stat().st_size > MOST_BYTES:
            raise BudgetError(f"--latency-table {path} is no file with a table of a model of pictures; {_CURE}")
        table = PictureTable.from_dict(strict_json.loads(file.read_bytes()))
    except OSError as error:
        raise BudgetError(f"--latency-table {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise BudgetError(f"--latency-table {path}: {error}") from error
    here = {"model": picture_facts(source, task), "machine": machine_here(str(table.machine.get("device", "cpu")))}
    for what, told in (("model", table.model), ("machine", table.machine)):
        for name in sorted({*told, *here[what]}):
            there, mine = told.get(name, "absent"), here[what].get(name, "absent")
            if there != mine:
                raise BudgetError(
                    f"--latency-table {path} is of another {what}: {name} is {there} in it, {mine} here; measure this"
                    " one with `compresso latency`"
                )
    return table


def limits_of(milliseconds: float | None, memory: str | None) -> dict[Quantity, float]:
    """What was asked for, by quantity. Raises BudgetError for what is no amount."""
    found: dict[Quantity, float] = {}
    if milliseconds is not None:
        if not (math.isfinite(milliseconds) and milliseconds > 0):
            raise BudgetError(f"--milliseconds {milliseconds}: wanted a positive number of milliseconds a picture")
        found["milliseconds"] = milliseconds
    if memory is not None:
        found["bytes"] = memory_bytes(memory)
    return found


def with_picture_budget(
    raw: Mapping[str, Any],
    table: PictureTable,
    limits: Mapping[Quantity, float],
    asked: str,
    macs_of: Callable[[Mapping[str, Any]], float],
) -> dict[str, Any]:
    """The raw recipe whose `keep` meets the limits.

    Args:
        raw: a recipe's mapping.
        table: of the model.
        limits: at most so much of each quantity; one at least.
        asked: the options, as they were written.
        macs_of: of what a raw recipe leaves; raises BudgetError where it can leave nothing so small, and ExportError
            where no config holds it.

    Raises:
        BudgetError: below the floor, which it names, or no budget: the dense model takes no more.
    """
    least, whole = table.widths[0], table.widths[-1]
    for quantity, limit in limits.items():
        floor = table.of(quantity, least.macs)
        if limit < floor:
            raise BudgetError(
                f"{asked}: the smallest network of the table, with {least.share:.0%} of each layer's channels, takes"
                f" {least_said(quantity, floor)}; give no less than that"
            )
    if all(table.of(quantity, whole.macs) <= limit for quantity, limit in limits.items()):
        takes = " and ".join(said(quantity, table.of(quantity, whole.macs)) for quantity in limits)
        raise BudgetError(f"{asked}: the dense model takes {takes} already; wanted less than that, or no such budget")

    def counted(low: int, high: int) -> tuple[int, float] | None:
        """The largest share between, in hundredths, that can be written, and its count; a config may hold no other."""
        for tried in range(high, low - 1, -1):
            try:
                return tried, macs_of(with_knob(raw, "keep", tried / 100, asked=asked))
            except ExportError:
                continue
            except BudgetError:  # so little cannot stay
                return None
        return None

    low, high, found = 1, 100, 0
    while low <= high:
        middle = (low + high) // 2
        there = counted(low, middle)
        if there is None:
            low = middle + 1
        elif all(table.of(quantity, there[1]) <= limit for quantity, limit in limits.items()):
            found, low = there[0], middle + 1
        else:
            high = there[0] - 1
    if not found:
        raise BudgetError(f"{asked}: the recipe leaves nothing so small; give more, or another recipe")
    return with_knob(raw, "keep", found / 100, asked=asked)


def said(quantity: Quantity, amount: float) -> str:
    """An amount for people: "212 ms", "0.51 GB"."""
    return f"{amount:.4g} ms" if quantity == "milliseconds" else f"{amount / 1e9:.3g} GB"


def least_said(quantity: Quantity, amount: float) -> str:
    """An amount for people that is no less than it is, in the words that options take."""
    if quantity == "milliseconds":
        return f"{_upward(amount):g} ms"
    return f"{_upward(amount / 1e9):g} GB"


def _upward(amount: float) -> float:
    """The next number of four digits.

    >>> _upward(0.435470336), _upward(27.4456), _upward(4096.0)
    (0.4355, 27.45, 4096.0)
    """
    step = 10.0 ** (math.floor(math.log10(amount)) - 3)
    return round(math.ceil(amount / step - 1e-9) * step, 6)


def picture_notes(
    raw: Mapping[str, Any], model: str, path: str | Path, facts: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """What a table tells of the dense model and of what a recipe leaves, for `compresso plan`; nothing of a model that
    reads text.

    Args:
        raw: a recipe's mapping, with its budget.
        model: as for a run.
        path: of the table.
        facts: "before" and "after", counted.
    """
    source = open_source(model, weights=False)
    if not of_pictures(source.config):
        return []
    table = read_picture_table(path, source, task_of(raw).name)
    both: list[str] = []
    for quantity in ("milliseconds", "bytes"):
        before, after = (table.of(quantity, facts[side]["macs_per_token"]) for side in ("before", "after"))
        both.append(f"{said(quantity, before)} -> {said(quantity, after)}")
    return [f"a picture by the table: {both[0]}, peak memory {both[1]}"]
