"""Answers written down: a stopped evaluation asks only the rest, and answers to something else are refused."""

import json
from pathlib import Path

import pytest

from compresso.data import nano
from compresso.errors import CheckpointError, ResumeError
from compresso.loading import load
from compresso.metrics.trust.asking import Limits, Request
from compresso.metrics.trust.journal import Journal, Journalled, tokenizer_digest
from tests.metrics.trust.scripted import Scripted

REQUESTS = [Request(f"r/{i}", f"question {i}" + " long" * (i % 5)) for i in range(30)]
SAME = {"model": "sha256:1"}


class Stopping(Scripted):
    """Is killed after so many requests."""

    def __init__(self, most: int) -> None:
        super().__init__(lambda one: one.text.upper())
        self.most = most

    def write(self, requests, limits):  # type: ignore[no-untyped-def]
        if self.asked + len(requests) > self.most:
            raise KeyboardInterrupt
        return super().write(requests, limits)


def test_a_stopped_evaluation_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "answers" / "model.jsonl"
    whole = Journalled(Stopping(99)).write(REQUESTS, Limits(8))
    with pytest.raises(KeyboardInterrupt):
        Journalled(Stopping(20), Journal(path, SAME)).write(REQUESTS, Limits(8))
    assert len(Journal(path, SAME)) == 16
    rest = Stopping(14)
    assert Journalled(rest, Journal(path, SAME)).write(REQUESTS, Limits(8)) == whole
    assert rest.asked == 14
    assert Journalled(Stopping(0), Journal(path, SAME)).write(REQUESTS, Limits(8)) == whole


def test_a_line_that_was_cut_short_is_asked_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "model.jsonl"
    whole = Journalled(Stopping(99), Journal(path, SAME)).write(REQUESTS, Limits(8))
    path.write_bytes(path.read_bytes()[:-10])
    again = Stopping(1)
    assert Journalled(again, Journal(path, SAME)).write(REQUESTS, Limits(8)) == whole
    assert again.asked == 1 and "is damaged; it and what follows is asked again" in caplog.text


@pytest.mark.parametrize(
    "change",
    [{"text": None}, {"degenerate": "false"}, {"fits": 1}, {"id": 5}, {"asked": None}, {"text": 5}],
)
def test_a_line_of_another_form_is_asked_again(
    change: dict[str, object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "model.jsonl"
    whole = Journalled(Stopping(99), Journal(path, SAME)).write(REQUESTS, Limits(8))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], json.dumps({**json.loads(lines[-1]), **change})]) + "\n")
    again = Stopping(1)
    assert Journalled(again, Journal(path, SAME)).write(REQUESTS, Limits(8)) == whole
    assert again.asked == 1 and "line 31 is damaged" in caplog.text


def test_weighed_and_written_answers_to_one_request_are_kept_apart(tmp_path: Path) -> None:
    path = tmp_path / "model.jsonl"
    model = Scripted(lambda _: "yes")
    asked = Journalled(model, Journal(path, SAME))
    weights = asked.weigh(REQUESTS[:3], [("yes", "no")] * 3)
    answers = asked.write(REQUESTS[:3], Limits(8))
    model.asked = 0
    again = Journalled(model, Journal(path, SAME))
    assert again.weigh(REQUESTS[:3], [("yes", "no")] * 3) == weights == [[0.0, -1.0]] * 3
    assert again.write(REQUESTS[:3], Limits(8)) == answers and model.asked == 0


def test_the_file_holds_no_prompt(tmp_path: Path) -> None:
    path = tmp_path / "model.jsonl"
    Journalled(Scripted(lambda _: "yes"), Journal(path, SAME)).write(REQUESTS, Limits(8))
    assert "question" not in path.read_text()
    assert json.loads(path.read_text().splitlines()[0]) == {"same": SAME}


def test_answers_to_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.jsonl"
    Journalled(Scripted(lambda _: "yes"), Journal(path, SAME)).write(REQUESTS, Limits(8))
    with pytest.raises(ResumeError, match="model was 'sha256:1', is 'sha256:2'"):
        Journal(path, {"model": "sha256:2"})
    with pytest.raises(ResumeError, match="'write r/0' was another request"):
        Journalled(Scripted(lambda _: "yes"), Journal(path, SAME)).write([Request("r/0", "another")], Limits(8))
    with pytest.raises(ResumeError, match="was another request"):
        Journalled(Scripted(lambda _: "yes"), Journal(path, SAME)).write(REQUESTS, Limits(9))
    path.write_text("something else\n")
    with pytest.raises(CheckpointError, match="is no journal of answers"):
        Journal(path, SAME)


def test_another_template_or_token_is_another_tokenizer() -> None:
    tokenizer = load(nano.path()).tokenizer
    assert tokenizer is not None
    before = tokenizer_digest(tokenizer)
    tokenizer(["a", "longer text"], padding=True, truncation=True, max_length=4)
    assert tokenizer_digest(tokenizer) == before, "what encoding leaves behind is no difference"
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    templated = tokenizer_digest(tokenizer)
    tokenizer.add_tokens(["<new>"])
    assert len({before, templated, tokenizer_digest(tokenizer)}) == 3
