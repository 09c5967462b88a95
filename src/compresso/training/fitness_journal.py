"""A fitness that is written down: a search killed after any candidate goes on with the same numbers.

A search that draws from its seed alone asks for the same candidates in the same order each time. So a resumed one is
told what the journal holds, candidate by candidate, and the model is asked from there on.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from compresso.errors import ResumeError
from compresso.solve.evolve import Fitness
from compresso.solve.level_choice import Levels
from compresso.training.progress import Progress
from compresso.training.ranks import ALONE, Ranks
from compresso.training.rounds import RoundJournal
from compresso.training.signals import noted_signals


@contextmanager
def journalled(
    fitness: Fitness,
    journal: RoundJournal | None,
    most: int,
    progress: Progress | None = None,
    name: str = "search",
    ranks: Ranks = ALONE,
) -> Iterator[Fitness]:
    """The same fitness, shown and written down, while the context lasts.

    Args:
        fitness: asked for what the journal does not hold.
        journal: of the search; None keeps none.
        most: candidates that will be asked for at most.
        progress, name: display.
        ranks: processes that search alike: each computes a fitness, and the main one's is that of all.

    Raises, when it is asked:
        ResumeError: the journal holds another candidate at this place.
        Interrupted: SIGINT or SIGTERM came; the journal has what is done.
    """
    entries = journal.entries() if journal is not None else []
    shown, done = progress or Progress("silent"), 0

    def written(levels: Levels, stage: int, /) -> float:
        nonlocal done
        if done < len(entries):
            assert journal is not None
            value = _read(entries[done], levels, stage, journal)
        else:
            value = ranks.agreed(fitness(levels, stage))
            if journal is not None:
                kept = value if math.isfinite(value) else str(value)
                journal.append({"levels": list(levels), "stage": stage, "fitness": kept})
            ranks.obey(requests, None if journal is None else str(journal.folder))
        done += 1
        shown.step(min(done, most), name, {"loss": value}, 0.0)
        return value

    with noted_signals() as requests, shown.running(most, min(len(entries), most), name):
        yield written


def _read(entry: object, levels: Levels, stage: int, journal: RoundJournal) -> float:
    """What the journal says of a candidate. Raises ResumeError if it is of another one."""
    if not isinstance(entry, Mapping) or (entry["levels"], entry["stage"]) != (list(levels), stage):
        raise ResumeError(
            f"{journal.folder}: a candidate is not the one that the search asks for; start afresh in another output"
            " folder"
        )
    return float(str(entry["fitness"]))
