"""What is shown where."""

import io
import threading
import time

import pytest

from compresso.training.progress import Progress, Style


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(style: Style, stream: io.StringIO, seconds: float = 0.0, done: int = 0) -> str:
    progress = Progress(style, seconds, stream)
    with progress.running(5, done):
        for i in range(done + 1, 6):
            progress.step(i, "ramp", {"loss": 2.0, "sparsity": 0.1, "target": 0.3}, tokens=7)
        progress.say("a [note]")
    return stream.getvalue()


def test_lines_without_a_terminal():
    lines = show("auto", io.StringIO()).splitlines()
    assert [line.split("  ")[1] for line in lines[:-1]] == [f"{i}/5" for i in range(1, 6)] and lines[-1] == "a [note]"
    for part in ("ramp", "loss 2.0000", "sparsity 0.1000 of 0.3000", "tokens/s"):
        assert part in lines[0]
    assert "left" not in lines[0], "the first step warms up: it tells nothing of the others"
    assert "0:00:00 left" in lines[1] and "in 0:00:00" in lines[4] and "\x1b" not in "".join(lines)


def test_quick_steps_are_told_by_the_clock():
    """Between the first step and the last, a line each half minute however many steps that is."""
    lines = show("lines", io.StringIO(), seconds=30.0).splitlines()
    assert [line.split("  ")[1] for line in lines[:-1]] == ["1/5", "5/5"]


def test_what_is_quick_is_not_mentioned():
    stream = io.StringIO()
    progress = Progress("lines", 0.0, stream)
    with progress.running(2, 0, patience=60.0):
        progress.step(1, "texts", {}, 0)
        progress.step(2, "texts", {}, 0)
    assert stream.getvalue() == ""


def lines_after(stream: io.StringIO, n: int) -> list[str]:
    """What was said once there are so many lines; a minute is waited at most."""
    until = time.monotonic() + 60
    while (said := stream.getvalue().splitlines())[n - 1 :] == [] and time.monotonic() < until:
        time.sleep(0.005)
    return said


def test_a_step_that_takes_long_is_no_silence():
    stream = io.StringIO()
    progress = Progress("lines", 0.01, stream)
    with progress.running(3, 0, "scores"):
        assert lines_after(stream, 1)[0].startswith("scores  0/3, working for 0:00:0")
        progress.step(1, "scores", {}, 0)
        told = len(stream.getvalue().splitlines())
        assert "scores  1/3, working for" in lines_after(stream, told + 2)[-1]
    before = stream.getvalue()
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]
    assert stream.getvalue() == before


def test_work_without_steps_is_mentioned_once_it_takes_long(monkeypatch: pytest.MonkeyPatch):
    stream = io.StringIO()
    with Progress("lines", 30.0, stream).working("reading"):
        pass
    assert stream.getvalue() == ""
    monkeypatch.setattr("compresso.training.progress.PATIENCE", 0.01)
    with Progress("lines", 0.02, stream).working("reading the weights"):
        said = lines_after(stream, 2)
    assert all(line.startswith("reading the weights  0:00:0") for line in said)


def test_the_watch_ends_with_an_error():
    with pytest.raises(ValueError, match="bad"), Progress("lines", 0.01, io.StringIO()).working("reading"):
        raise ValueError("bad")
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_without_tokens_there_is_no_rate():
    stream = io.StringIO()
    progress = Progress("lines", 0.0, stream)
    with progress.running(1, 0):
        progress.step(1, "texts", {}, 0)
    assert stream.getvalue().startswith("texts  1/1  in ")


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
