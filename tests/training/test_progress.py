"""What is shown where."""

import io
import threading
import time

import pytest

from compresso.training import progress
from compresso.training.progress import Progress, Style


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(style: Style, stream: io.StringIO, seconds: float = 0.0, done: int = 0) -> str:
    shown = Progress(style, seconds, stream)
    with shown.running(5, done):
        for i in range(done + 1, 6):
            shown.step(i, "ramp", {"loss": 2.0, "sparsity": 0.1, "target": 0.3}, tokens=7)
        shown.say("a [note]")
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


def test_parts_of_a_step_that_takes_long_are_told_and_forgotten_with_it(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr("compresso.training.progress.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    progress = Progress("lines", 0.0, stream)
    with progress.running(4, 1, "gates"):
        progress.part(32, 128, "micro-batches")
        now[0] += 60
        progress._again()
        progress.step(2, "gates", {}, 0)
        progress._again()
    told, _, after = stream.getvalue().splitlines()
    assert told == "gates  1/4, 32 of 128 micro-batches, working for 0:01:00  0:11:00 left"  # 3 steps at 4 minutes
    assert after == "gates  2/4, working for 0:01:00"


def test_a_bar_moves_within_a_step():
    progress = Progress("bar", 0.0, Terminal())
    with progress.running(4, 1, "gates"):
        progress.part(32, 128, "micro-batches")
        assert progress._bar is not None and progress._bar.tasks[0].completed == 1.25


def test_work_without_steps_is_mentioned_once_it_takes_long(monkeypatch: pytest.MonkeyPatch):
    stream = io.StringIO()
    with Progress("lines", 30.0, stream).working("reading"):
        pass
    assert stream.getvalue() == ""
    monkeypatch.setattr("compresso.training.progress.PATIENCE", 0.01)
    with Progress("lines", 0.02, stream).working("reading the weights"):
        said = lines_after(stream, 2)
    assert all(line.startswith("reading the weights  0:00:0") for line in said)


def test_what_runs_within_something_else_shares_its_line(monkeypatch: pytest.MonkeyPatch):
    """Two counters of one run, each with a clock of its own, took turns."""
    monkeypatch.setattr(progress, "PATIENCE", 0.02)
    stream = io.StringIO()
    with Progress("lines", 0.02, stream).working("writing"):
        with Progress("lines", 0.02, stream).working("asking onnx"):
            lines_after(stream, 2)
        told = len(stream.getvalue().splitlines())
        assert all(line.startswith("writing: asking onnx  0:") for line in stream.getvalue().splitlines())
        assert lines_after(stream, told + 2)[-1].startswith("writing  0:")
        within = Progress("lines", 0.02, stream)
        with within.running(3, 0, "scores"):
            told = len(stream.getvalue().splitlines())
            assert all(line.startswith("scores  0/3, working") for line in lines_after(stream, told + 3)[told + 1 :])
    stream = io.StringIO()
    with Progress("silent").working("writing"), Progress("lines", 0.02, stream).working("asking onnx"):
        time.sleep(0.1)
    assert stream.getvalue() == "", "who asked for no display gets none from within"
    assert not progress._FRAMES


def test_a_bar_within_a_bar_takes_its_place(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal()
    with Progress("bar", stream=terminal).working("writing"):
        with Progress("bar", stream=terminal).running(2, 0, "scores") as _:
            pass
        with Progress("bar", stream=terminal).working("asking onnx"):
            pass
    assert "writing: asking onnx" in terminal.getvalue() and "scores" in terminal.getvalue()
    assert not progress._FRAMES


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
