"""Text of other libraries and programs in messages of ours: one bounded line, and nothing that a terminal obeys."""

import re
from pathlib import Path

import pytest

import compresso
from compresso import errors
from compresso.checkpoint.reasons import reason_of
from compresso.cli.streams import say
from compresso.engines.transformers import why
from compresso.errors import quoted, without_escapes

ORDERS = {
    "colour": "\x1b[96m{}\x1b[0m",
    "bold and bright": "\x1b[1;31m{}\x1b[m",
    "cursor": "\x1b[2K\x1b[1G{}",
    "title of the window": "\x1b]0;owned\x07{}",
    "link": "\x1b]8;;https://example.org\x1b\\{}\x1b]8;;\x1b\\",
    "character set": "\x1b(B{}",
    "8-bit": "\x9b{}",
    "bell and backspace": "\x07{}\x08",
    "one that never ends": "{}\x1b",
}
PLAIN = re.compile(r"[^\x00-\x1f\x7f-\x9f]*")


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_no_order_to_the_terminal_is_left(order: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = order.format("9 steps") + "\n  Next: " + order.format("more")
    assert PLAIN.fullmatch(quoted(text)) and "steps" in quoted(text)
    assert quoted(RuntimeError(text)) == reason_of(RuntimeError(text)) == quoted(text)
    assert why(f"Traceback:\n  File\n{order.format('ValueError: no')}\n", 1).endswith("ValueError: no")
    say(text)
    assert PLAIN.fullmatch(capsys.readouterr().err.removesuffix("\n"))


def test_what_is_quoted_is_bounded_at_the_end_that_was_asked_for() -> None:
    text = "\x1b[96mbegin\x1b[0m " + "middle " * 100 + "end"
    assert quoted(text, 5) == "begin" and quoted(text, 3, last=True) == "end"
    assert len(quoted(text)) == 300
    assert without_escapes("Übung, naïve: 100 % €, 中文\tand\nlines") == "Übung, naïve: 100 % €, 中文\tand\nlines"


def test_everything_of_others_goes_through_it() -> None:
    """No module puts an error's own words, or what a process said, on one line by itself."""
    by_itself = re.compile(r"str\(error\)\.(split|partition)|(said|stderr|stdout)\)?\.split\(\)")
    for path in Path(str(compresso.__file__)).parent.rglob("*.py"):
        for line in path.read_text("utf-8").splitlines():
            assert not by_itself.search(line) or "quoted(" in line or path == Path(errors.__file__), f"{path}: {line}"
