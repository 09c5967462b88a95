"""Scores of a task and means of several, with standard errors: arithmetic on what the harness found for each item."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

METRICS = ("acc", "acc_norm", "exact_match")


@dataclass(frozen=True, slots=True)
class Score:
    """A metric over `n` items; `stderr` is None for a single one, which tells nothing of the spread."""

    value: float
    stderr: float | None
    n: int


def scores_of(samples: Sequence[Mapping[str, Any]]) -> dict[str, Score]:
    """Mean of each metric over items, and its standard error: the sample's standard deviation over the root of n."""
    scores: dict[str, Score] = {}
    for metric in METRICS:
        values = [float(sample[metric]) for sample in samples if metric in sample]
        if not values:
            continue
        n = len(values)
        mean = sum(values) / n
        stderr = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n) if n > 1 else None
        scores[metric] = Score(mean, stderr, n)
    return scores


def mean_score(scores: Sequence[Score], over: Literal["tasks", "items"]) -> Score:
    """Mean over tasks, each counting the same, or over all their items; tasks are taken as independent samples."""
    n = sum(score.n for score in scores)
    shares = [score.n / n if over == "items" else 1 / len(scores) for score in scores]
    value = sum(share * score.value for share, score in zip(shares, scores, strict=True))
    errors = [share * score.stderr for share, score in zip(shares, scores, strict=True) if score.stderr is not None]
    return Score(value, math.hypot(*errors) if len(errors) == len(scores) else None, n)
