"""What became of trust, as rows that report and card show, and what is advised."""

from collections.abc import Sequence

from compresso.metrics.record import Change, ModelResults
from compresso.report.records import RunRecords

TITLES = ("", "dense", "this model", "difference", "95 %", "")
FEW_BITS = 4
"""Bits a weight below which the paper found trust to fall, where accuracy did not show it."""
_PAPER = "arXiv 2403.15447"


def trust_rows(changes: Sequence[Change]) -> list[tuple[str, ...]]:
    """Name, both scores in percent, the difference in points with its interval, and the verdict."""
    return [
        (
            title(one.name),
            _percent(one.dense),
            _percent(one.smaller),
            "" if one.difference is None else _points(one.difference),
            "" if one.low is None or one.high is None else f"{_points(one.low)} to {_points(one.high)}",
            f"{_VERDICTS.get(one.verdict, one.verdict)}{': ' if one.words else ''}{one.words}",
        )
        for one in changes
    ]


def title(name: str) -> str:
    """A dimension's name for people.

    >>> title("trust/out_of_distribution")
    'out of distribution'
    """
    return name.removeprefix("trust/").replace("_", " ")


def fallen(results: ModelResults) -> list[str]:
    """The dimensions that fell by more than three points, beyond noise."""
    return [title(one.name) for one in results.changes if one.verdict == "fell"]


def advice(records: RunRecords, results: ModelResults) -> list[str]:
    """The recommendations of arXiv 2403.15447 that apply to a run."""
    bits = {name: facts.bits for name, facts in records.stages.items() if facts.bits}
    told: list[str] = []
    for name, few in bits.items():
        if few < FEW_BITS:
            told.append(
                f"{name} left {few:g} bits a weight. {_PAPER} found trust kept at {FEW_BITS} bits and lost at 3, where"
                f" accuracy does not show it: prefer {FEW_BITS}, or evaluate several calibration seeds."
            )
    zeros = {name: facts.sparsity for name, facts in records.stages.items() if facts.sparsity}
    if results.changes and any(share >= 0.5 for share in zeros.values()):
        told.append(f"{_PAPER} found that pruning half of the weights costs trust where {FEW_BITS} bits do not.")
    if results.changes:
        told.append("Evaluate every dimension again after further compression or tuning: none follows from another.")
    return told


_VERDICTS = {"fell": "FELL", "rose": "higher"}


def _percent(share: float | None) -> str:
    return "not measured" if share is None else f"{100 * share:.1f}"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "\u2212")
