"""What each stage of a run cost and left, a row a stage, the dense model first; terminal, page and card show it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compresso.metrics.record import Measurement
from compresso.report.columns import title, written
from compresso.report.facts import written_time
from compresso.report.records import RunRecords
from compresso.report.stage_facts import Left, StageFacts

DENSE = "dense"
ABSENT = ""


@dataclass(frozen=True)
class StageTable:
    """Titles, and as many cells in each row: the first names the stage, the others are numbers."""

    titles: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def lines(self) -> list[str]:
        """The table for a terminal: names to the left, numbers to the right."""
        every = [self.titles, *self.rows]
        widths = [max(len(row[i]) for row in every) for i in range(len(self.titles))]
        first, others = widths[0], widths[1:]
        return [
            "  ".join([row[0].ljust(first), *(cell.rjust(n) for cell, n in zip(row[1:], others, strict=True))]).rstrip()
            for row in every
        ]


def stage_table(records: RunRecords) -> StageTable | None:
    """The table of a run of several stages; None for a single stage, of which the summary tells as much, and for
    records of a version that did not look between the stages.
    """
    rows = [(name, facts, facts.left) for name, facts in records.stages.items() if facts.left is not None]
    if len(records.stages) < 2 or len(rows) < len(records.stages):
        return None
    every = [(DENSE, StageFacts(left=_dense(records)), _dense(records))] if records.dense is None else []
    every += rows
    shown = [
        (words, of) for words, of, always in _COLUMNS if always or any(of(facts, left) for _, facts, left in every)
    ]
    metric = next((left.score.name for _, _, left in every if left.score is not None), None)
    of_each = _MACS.replace("token", records.after.macs_of)
    titles = (
        "stage",
        *(of_each if words == _MACS else words for words, _ in shown),
        *([_metric(metric)] if metric else []),
        "took",
    )
    return StageTable(
        titles,
        tuple(
            (
                name,
                *(of(facts, left) or ABSENT for _, of in shown),
                *([_score(left.score)] if metric else []),
                ABSENT if facts.seconds is None else written_time(facts.seconds, facts.since_resume),
            )
            for name, facts, left in every
        ),
    )


def _dense(records: RunRecords) -> Left:
    """The dense model as if a stage had left it, with the metric that the others have."""
    before = records.before
    wanted = {facts.left.score.name for facts in records.stages.values() if facts.left and facts.left.score}
    found = [one for one in records.report.models[0].measurements if one.name in wanted]
    return Left(
        parameters=before.parameters["total"],
        macs_per_token=before.macs_per_token,
        held_loss=before.held_loss,
        score=found[0] if found else None,
    )


def _metric(name: str) -> str:
    """A metric's name for people: "held perplexity"."""
    return f"{title(name)} {name.rpartition('/')[2]}"


def _score(score: Measurement | None) -> str:
    return ABSENT if score is None else written(score.value, score.unit, score.name, score.stderr)


def _sparsity(facts: StageFacts, left: Left) -> str:
    """Of the weights that the stage worked on; behind it, of all matrices of blocks."""
    zeros = facts.sparsity or left.zeros
    return "" if zeros is None else f"{100 * zeros:.1f} %"


def _bits(facts: StageFacts, _: Left) -> str:
    return f"{facts.bits:.3g}" if facts.bits else ""


def _loss(_: StageFacts, left: Left) -> str:
    return "" if left.held_loss is None else f"{left.held_loss:.4f}"


_MACS = "MACs a token"
_COLUMNS: Sequence[tuple[str, Callable[[StageFacts, Left], str], bool]] = (
    ("parameters", lambda _, left: f"{left.parameters:,}", True),
    (_MACS, lambda _, left: f"{left.macs_per_token:,}", True),
    ("zeros", _sparsity, False),
    ("bits a weight", _bits, False),
    ("held loss", _loss, False),
)
"""Title, the cell, and whether it stands there even if all cells are empty."""
