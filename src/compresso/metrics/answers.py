"""How a model finds answers that no stage trained on: F1 of words and exact match, each with its standard error over
questions, beside the F1 of giving the whole text for an answer.

Of all windows of a question the answer with the largest sum of two logits counts. Where questions may have no answer
(SQuAD 2, arXiv 1806.03822), the two logits of the first token say so, in the window where they sum to the least: there
is none if that is above the best answer's sum, as in BERT's code. Then no answer is right where people gave none, 0
elsewhere, and counted beside is the F1 of never answering. Questions about one text are not independent, so the errors
are too small by what they share.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from compresso.core.answer_window import AnswerWindow
from compresso.core.answers import answer_f1, exact_match
from compresso.core.loss import SPAN, logits_of
from compresso.core.row import Row
from compresso.metrics.by_length import Collate, examples_sha256, losses_by_length
from compresso.metrics.forward import check_ids
from compresso.metrics.record import Environment, How, Measurement

F1, EXACT, WHOLE = "held/f1", "held/exact_match", "held-whole-text/f1"
NEVER = "held-no-answer/f1"


@dataclass(frozen=True)
class AnswerScore:
    """What a model answered.

    Args:
        nats: the loss of each window.
        f1, exact: of each question.
        whole: the F1 of each question of answering with all of its text.
        never: that of saying that there is no answer; empty where there always is one.
        examples_sha256: of the ids and labels of the windows; the same ones have the same.
    """

    nats: tuple[float, ...]
    f1: tuple[float, ...]
    exact: tuple[bool, ...]
    whole: tuple[float, ...]
    examples_sha256: str
    never: tuple[float, ...] = ()

    @property
    def mean(self) -> float:
        """Nats a place, of first and last tokens."""
        return math.fsum(self.nats) / len(self.nats)

    def measurements(self, environment: Environment, corpus: str, *, noise: bool = False) -> tuple[Measurement, ...]:
        """F1 and exact match with their standard errors over questions; counted beside them the F1 of the whole text,
        and of no answer where there may be none.
        """
        n = len(self.f1)
        shared: dict[str, Any] = {"unit": "share", "n": n, "environment": environment}
        shared["protocol"] = {
            "corpus": corpus,
            "examples": n,
            "windows": len(self.nats),
            "examples_sha256": self.examples_sha256[:16],
        }
        rows: tuple[tuple[str, Sequence[float], How], ...] = (
            (F1, self.f1, "measured"),
            (EXACT, self.exact, "measured"),
            (WHOLE, self.whole, "counted"),
            *([(NEVER, self.never, "counted")] if self.never else []),
        )
        return tuple(
            Measurement(
                name=name,
                value=math.fsum(values) / n,
                how=how,
                stderr=statistics.stdev(map(float, values)) / math.sqrt(n) if how == "measured" and n > 1 else None,
                **shared,
            )
            for name, values, how in rows
        )


def answer_score(
    model: PreTrainedModel,
    rows: Sequence[Row],
    collate: Collate,
    batch_size: int = 16,
) -> AnswerScore:
    """What a model answers, windows of like length together; its mode is put back.

    Raises:
        DataError: no examples, or ids that the model does not have.
        NumericError: a loss is not finite.
    """
    check_ids(model, [row["input_ids"] for row in rows])
    said, none = [(-math.inf, "")] * len(rows), [math.inf] * len(rows)

    def scores(places: Sequence[int], batch: dict[str, Tensor]) -> list[float]:
        logits = logits_of(model, batch).float()
        for row, i in enumerate(places):
            starts, ends = logits[row, : len(rows[i]["input_ids"])].cpu().unbind(-1)
            said[i], none[i] = _window(rows[i]).best(starts, ends), _window(rows[i]).none(starts, ends)
        labels = batch["labels"]
        return [float(SPAN.mean(logits[n : n + 1], labels[n : n + 1])) for n in range(len(places))]

    nats = losses_by_length(model, rows, collate, batch_size, scores)
    best: dict[int, tuple[float, int]] = {}
    least: dict[int, float] = {}
    for i, (score, _) in enumerate(said):
        question = _window(rows[i]).question
        if question not in best or score > best[question][0]:
            best[question] = (score, i)
        least[question] = min(none[i], least.get(question, math.inf))
    windows = [_window(rows[i]) for _, i in best.values()]
    texts = [
        "" if window.open and least[window.question] > score else said[i][1]
        for (score, i), window in zip(best.values(), windows, strict=True)
    ]
    wanted = [window.answers or ("",) for window in windows]  # no words, which only no words are like
    return AnswerScore(
        nats,
        tuple(map(answer_f1, texts, wanted)),
        tuple(map(exact_match, texts, wanted)),
        tuple(answer_f1(window.context, answers) for window, answers in zip(windows, wanted, strict=True)),
        examples_sha256(rows),
        tuple(answer_f1("", answers) for answers in wanted) if any(window.open for window in windows) else (),
    )


def _window(row: Row) -> AnswerWindow:
    assert "window" in row  # rows of this task have it
    return row["window"]
