"""A search that is stopped at any candidate and continued is the uninterrupted one, and asks for no candidate again."""

import math
import os
import signal
from pathlib import Path

import pytest

from compresso.errors import ResumeError
from compresso.solve.evolve import Evolution, Evolved
from compresso.solve.level_choice import Item, Levels
from compresso.solve.search import Search, search_levels, with_errors
from compresso.training.fitness_journal import journalled
from compresso.training.rounds import RoundJournal
from compresso.training.signals import Interrupted

SHORT = Evolution(generations=4, offspring=4, survivors=(2,))
ITEMS = [Item(f"item {i}", (float(i % 3 + 1), 0.0)) for i in range(6)]


class Killed(Exception):
    """Stands for what nobody can catch."""


def error(levels: Levels, stage: int, /) -> float:
    """What levels do, not all of it alone, with one candidate that is no number."""
    if levels == (0, 0, 1, 1, 1, 0):
        return math.nan
    return sum((i * 7 % 5 + 1) * n for i, n in enumerate(levels)) / 3 - levels[0] * levels[3] + stage / 7


class Model:
    """A fitness that counts, and is killed before a candidate or signalled during it."""

    def __init__(self, killed_at: int = -1, signalled_at: int = -1) -> None:
        self.killed_at, self.signalled_at, self.asked = killed_at, signalled_at, 0

    def __call__(self, levels: Levels, stage: int, /) -> float:
        if self.asked == self.killed_at:
            raise Killed
        if self.asked == self.signalled_at:
            os.kill(os.getpid(), signal.SIGTERM)
        self.asked += 1
        return error(levels, stage)


def searched(model: Model, folder: Path | None, seed: int = 0) -> Evolved:
    journal = None if folder is None else RoundJournal(folder, {"search": "this"})
    with journalled(model, journal, 100) as fitness:
        items = with_errors(ITEMS, (0,) * 6, fitness)
        return search_levels(Search.EVOLVE, items, 7.0, (1,) * 6, fitness, SHORT, seed=seed)


def test_a_search_killed_at_any_candidate_goes_on_to_the_same_result(tmp_path: Path) -> None:
    plain = Model()
    expected = searched(plain, None)
    assert plain.asked > 20
    for place in range(0, plain.asked, 6):
        folder, again = tmp_path / str(place), Model()
        with pytest.raises(Killed):
            searched(Model(killed_at=place), folder)
        assert searched(again, folder) == expected
        assert again.asked == plain.asked - place


def test_a_signal_stops_behind_a_candidate_that_is_kept(tmp_path: Path) -> None:
    expected = searched(Model(), None)
    with pytest.raises(Interrupted):
        searched(Model(signalled_at=9), tmp_path / "j")
    assert len(RoundJournal(tmp_path / "j", {"search": "this"}).entries()) == 10
    assert searched(Model(), tmp_path / "j") == expected


def test_every_candidate_is_in_the_journal(tmp_path: Path) -> None:
    model = Model()
    found = searched(model, tmp_path)
    entries = RoundJournal(tmp_path, {"search": "this"}).entries()
    assert len(entries) == model.asked
    last = {tuple(e["levels"]): float(e["fitness"]) for e in entries if e["stage"] == SHORT.last}  # type: ignore[index, call-overload, arg-type]
    assert {levels: value for levels, value in found.finalists if math.isfinite(value)} == {
        levels: value for levels, value in last.items() if math.isfinite(value)
    }


def test_another_search_is_refused(tmp_path: Path) -> None:
    searched(Model(), tmp_path, seed=0)
    with pytest.raises(ResumeError, match="is not the one that the search asks for"):
        searched(Model(), tmp_path, seed=1)
