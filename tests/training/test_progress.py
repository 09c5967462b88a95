"""What is shown where."""

import io

import pytest

from compresso.training.progress import Progress, Style


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(style: Style, stream: io.StringIO, every: int = 2, done: int = 0) -> str:
    progress = Progress(style, every, stream)
    with progress.running(5, done):
        for i in range(done + 1, 6):
            progress.step(i, "ramp", {"loss": 2.0, "sparsity": 0.1, "target": 0.3}, tokens=7)
        progress.say("a [note]")
    return stream.getvalue()


def test_lines_without_a_terminal():
    lines = show("auto", io.StringIO()).splitlines()
    assert [line.split("  ")[1] for line in lines[:-1]] == ["1/5", "2/5", "4/5", "5/5"] and lines[-1] == "a [note]"
    for part in ("ramp", "loss 2.0000", "sparsity 0.1000 of 0.3000", "tokens/s", "left"):
        assert part in lines[0]
    assert "0:00:00 left" in lines[3] and "\x1b" not in "".join(lines)


def test_a_resumed_run_starts_where_it_was():
    assert show("auto", io.StringIO(), done=2).splitlines()[0].startswith("ramp  3/5")


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_lines_where_colour_is_not_wanted(monkeypatch: pytest.MonkeyPatch, name: str, value: str):
    monkeypatch.setenv(name, value)
    assert "\x1b" not in show("auto", Terminal())


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    text = show("auto", Terminal())
    assert "\x1b" in text
    for part in ("ramp", "5/5", "loss 2.0000", "sparsity 0.1000 of 0.3000", "tokens/s", "a [note]"):
        assert part in text


def test_silence():
    assert show("silent", Terminal()) == ""
