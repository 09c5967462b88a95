"""What removing a little at a time is worth beside removing all at once and as many updates after it, on a decoder that
knows its language: the spec's tests g and h, with half and with 70 % of the blocks gone, five seeds.

What is compared is the divergence from the dense model on held-out examples at the end, where 60 updates in all leave
both short of it. With twice as many updates, both relearn this language and the two are not told apart.
"""

import copy
import statistics
from dataclasses import replace
from typing import Any

import pytest

from compresso.job import Job
from tests.methods.conftest import MakeJob
from tests.methods.test_distill import from_dense
from tests.methods.test_homodistil import distilled, taught

UPDATES, SEEN = 60, 8
KNOBS: dict[str, Any] = {
    "of": "blocks",
    "steps": UPDATES,
    "lr": 2e-3,
    "hard_weight": 0.0,
    "attention_weight": 0.0,
    "embedding_weight": 0.0,
    "norm": "global",
    "cuts": 8,
}
GRADUAL = {"done": 0.35}
AT_ONCE = {"start": (SEEN - 1) / UPDATES, "done": SEEN / UPDATES}
"""All leave after as many updates as the moving average has seen."""


def ends(job: Job, keep: float, how: dict[str, float]) -> tuple[float, float]:
    """The divergence at the end, on held-out examples, and its peak on the way."""
    after = distilled(job, **KNOBS, keep=keep, **how)
    return from_dense(after), max(after.records["homodistil"]["curve"]["divergence"])


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0.5, 0.3])
def test_a_gradual_removal_ends_nearer_to_the_teacher(make_job: MakeJob, keep: float) -> None:
    job = taught(make_job())
    gradual, at_once = (
        [
            ends(replace(job, model=copy.deepcopy(job.model), seed=seed, out=job.out / f"{seed} {name}"), keep, how)
            for seed in range(5)
        ]
        for name, how in (("gradual", GRADUAL), ("at once", AT_ONCE))
    )
    assert all(one[1] < other[1] for one, other in zip(gradual, at_once, strict=True)), (gradual, at_once)
    assert statistics.fmean(one[0] for one in gradual) < statistics.fmean(one[0] for one in at_once), (gradual, at_once)
