"""What to do about a bad line: leaving it out helps only where something is left, and where the caller can.

`skip_bad` is None of readers whose command has no such choice.
"""

from collections.abc import Iterator, Mapping
from itertools import islice

from compresso.core.counted import counted
from compresso.data.found import Found
from compresso.data.record_forms import BadRecord, RecordForm, printable

LOOKED_AT = 1000
"""Lines behind a first bad one among which a good one is looked for."""
REPAIR = "Repair it"


def cure(bad: Found, others: Iterator[Found], form: RecordForm, skip_bad: bool | None, good: bool) -> str:
    """What to do about a file's first bad line, as a sentence.

    Args:
        bad: the line.
        others: the lines behind it, of which some are read.
        form: what a line should hold.
        skip_bad: None where the caller cannot skip.
        good: whether a line before it is good.
    """
    if not good:
        looked = 0
        for looked, each in enumerate(islice(others, LOOKED_AT), 1):  # noqa: B007  read behind the loop
            if _is_good(each, form):
                good = True
                break
        if not good and not looked:
            return f"{_wrapped(bad.value) or f'{REPAIR}; the file holds nothing else'}."
        if not good:
            of = f"the first {looked + 1:,} lines" if looked == LOOKED_AT else f"its {counted(looked + 1, 'line')}"
            return f"None of {of} is good, so repair the file."
    return f"{REPAIR}{skips(skip_bad, ' bad lines')}."


def skips(skip_bad: bool | None, what: str) -> str:
    """The advice to leave something out, behind another one; "" where the caller cannot."""
    return "" if skip_bad is None else f", or add --skip-bad to skip and count{what}"


def _is_good(found: Found, form: RecordForm) -> bool:
    if found.wrong:
        return False
    try:
        form.take(found.value)
    except BadRecord:
        return False
    return True


def _wrapped(value: object) -> str:
    """What to do with an object around a list of rows; "" for any other."""
    lists = [
        str(name)
        for name, held in (value.items() if isinstance(value, Mapping) else ())
        if isinstance(held, list) and held and isinstance(held[0], Mapping)
    ]
    return f"Its rows lie in '{printable(lists[0])}': write that list alone, or a row a line" if len(lists) == 1 else ""
