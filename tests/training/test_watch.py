"""Watching a held-out loss: it changes no update, the best state comes back, training ends when the loss only rises,
and a resumed run decides as the whole one did.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tests.training.test_fit import Line, equal, stopping, train, weights

from compresso.errors import ResumeError
from compresso.training.checkpoint import TrainingCheckpoints
from compresso.training.watch import Watch


def scripted(
    losses: Sequence[float], seen: list[torch.Tensor] | None = None, line: Line | None = None
) -> Callable[[], float]:
    """A score that says these losses one after the other, and draws from torch's generator as no evaluation should."""
    left = list(losses)

    def score() -> float:
        torch.rand(3)
        if line is not None and seen is not None:
            seen.append(line.w.detach().clone())
        return left.pop(0)

    return score


def test_a_loss_that_only_falls_leaves_the_weights_of_an_unwatched_run():
    alone, watched = Line(dropout=0.5), Line(dropout=0.5)
    wanted = train(alone)
    watch = Watch(scripted([4, 3, 2, 1]), 6, 4, 1)
    assert train(watched, watch=watch) == wanted and equal(weights(alone), weights(watched))
    assert watch.facts()["held"] == {
        "update": [0, 2, 4, 6],
        "loss": [4, 3, 2, 1],
        "best": 6,
        "ended": 6,
        "why": "all 6 updates were done",
    }


@pytest.mark.parametrize("patience", [1, 2])
def test_training_ends_when_the_loss_only_rises_and_the_best_state_is_left(patience: int):
    line, seen = Line(), list[torch.Tensor]()
    watch = Watch(scripted([4, 3, 3, 5, 6, 7, 8], seen, line), 6, 7, patience)
    history = train(line, watch=watch)
    facts = watch.facts()["held"]
    assert (facts["best"], facts["ended"]) == (1, 1 + patience)
    assert len(history.rows) == len(seen) - 1 == 1 + patience
    assert torch.equal(line.w, seen[1]) and not torch.equal(seen[1], seen[-1])
    assert f"stopped after {1 + patience} of 6 updates" in facts["why"]


def test_a_loss_that_rises_at_the_end_only_gives_the_state_before_and_no_stop():
    line, seen = Line(), list[torch.Tensor]()
    watch = Watch(scripted([4, 5, 3, 3.5], seen, line), 6, 4, 2)
    assert len(train(line, watch=watch).rows) == 6
    assert torch.equal(line.w, seen[2]) and watch.facts()["held"]["why"] == "all 6 updates were done"


@pytest.mark.parametrize("at", [2, 3, 4])
def test_a_resumed_run_decides_as_the_whole_one(tmp_path: Path, at: int):
    """The losses are a function of the weights, so that the resumed run sees the same; the best lies before the cut."""

    def watching(line: Line) -> Watch:
        return Watch(lambda: abs(float(line.w.detach().sum()) + 0.022), 6, 7, 2)

    whole, cut, resumed = (Line(dropout=0.5) for _ in range(3))
    watches = [watching(line) for line in (whole, cut, resumed)]
    wanted = train(whole, watch=watches[0], checkpoints=TrainingCheckpoints(tmp_path / "whole"))
    assert 0 < watches[0].best < max(watches[0].facts()["held"]["update"])
    with pytest.raises(RuntimeError):
        checkpoints = TrainingCheckpoints(tmp_path / "cut")
        train(cut, watch=watches[1], checkpoints=checkpoints, save_every=2, after_update=stopping(at))
    found = train(resumed, watch=watches[2], checkpoints=TrainingCheckpoints(tmp_path / "cut"), save_every=2)
    assert found == wanted and equal(weights(resumed), weights(whole))
    assert watches[2].facts() == watches[0].facts()
    again, watch = Line(), watching(Line())
    assert train(again, watch=watch, checkpoints=TrainingCheckpoints(tmp_path / "whole")) == wanted
    assert again.micros == [] and equal(weights(again), weights(whole))


def test_a_run_that_was_not_watched_is_not_resumed_watched(tmp_path: Path):
    train(Line(), checkpoints=TrainingCheckpoints(tmp_path))
    with pytest.raises(ResumeError, match=r"fit\.held"):
        train(Line(), watch=Watch(scripted([1, 2]), 6, 2, 1), checkpoints=TrainingCheckpoints(tmp_path))


@pytest.mark.parametrize("evaluations", [2, 5, 10])
@pytest.mark.parametrize("updates", [1, 3, 300])
def test_evaluations_are_few_and_include_both_ends(evaluations: int, updates: int):
    at = Watch(float, updates, evaluations, 1).identity["at"]
    assert (at[0], at[-1]) == (0, updates) and len(at) == min(evaluations, updates + 1)
