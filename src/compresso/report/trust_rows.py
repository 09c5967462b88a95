"""What became of trust, as rows that report and card show."""

from collections.abc import Sequence

from compresso.metrics.record import Change, ModelResults

TITLES = ("", "dense", "this model", "difference", "95 %", "n", "")


def trust_rows(changes: Sequence[Change]) -> list[tuple[str, ...]]:
    """Name, both scores in percent, the difference in points with its interval, of how many items, and the verdict."""
    return [
        (
            title(one.name),
            _percent(one.dense),
            _percent(one.smaller),
            "" if one.difference is None else _points(one.difference),
            "" if one.low is None or one.high is None else f"{_points(one.low)} to {_points(one.high)}",
            "" if one.n is None else f"{one.n:,}",
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


_VERDICTS = {"fell": "FELL", "rose": "higher"}


def _percent(share: float | None) -> str:
    return "not measured" if share is None else f"{100 * share:.1f}"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "\u2212")
