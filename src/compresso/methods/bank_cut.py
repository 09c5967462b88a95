"""What methods that search a bank share: rows set apart to judge by, and the job at chosen levels. No method."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from compresso.core.axis import Axis, Kind
from compresso.core.counted import counted
from compresso.core.plan import Plan
from compresso.core.row import Row
from compresso.errors import DataError, ResourceError
from compresso.job import Job
from compresso.solve.bank_choice import Menu
from compresso.solve.level_choice import Levels
from compresso.sweep.bank_levels import BankLevels


def refuse_apart(job: Job, stage: str) -> None:
    """Refuse jobs whose model is not in memory. Raises ResourceError."""
    if job.offloaded is not None:
        raise ResourceError(f"stage '{stage}' puts candidates together in memory; start it without --offload")


def places_apart(rows: Sequence[Row], most: Sequence[int], seed: int) -> list[list[int]]:
    """Places of rows that candidates are fitted to, and, for each number of `most`, of as many others or a third of
    all; drawn without repetition.

    Raises:
        DataError: there are fewer than 3.
    """
    if len(rows) < 3:
        raise DataError(
            f"{counted(len(rows), 'calibration example')}: candidates are fitted to some and judged by others;"
            " give at least 3"
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    found: list[list[int]] = []
    for n in (min(one, len(rows) // 3) for one in most):
        found.append(sorted(order[:n]))
        order = order[n:]
    return [sorted(order), *found]


def unseen(rows: Sequence[Row], *apart: Sequence[int]) -> dict[str, Any]:
    """What the records say of rows that weights were not fitted to, for `Job.unseen`."""
    return {"of": len(rows), "places": sorted(place for places in apart for place in places)}


def cut(
    job: Job, levels: Levels, *, choice: Menu, axes: Sequence[Axis], fitted: Callable[[Job], BankLevels], by: str
) -> Job:
    """The job at these levels: weights fitted, units removed, and then the layers that lost all.

    Args:
        job: its model is changed.
        levels: of the sub-layers that there is a choice of.
        choice: the menu.
        axes: of the model, those of query heads among them.
        fitted: what puts a job's model at levels.
        by: the stage.
    """
    gone = choice.empty_blocks(levels)
    fitted(job).fit_(levels)
    left = choice.plan(levels).kept
    plan = Plan({name: units for name, units in left.items() if name != "layers"})
    job = job.without(plan.masks(axes), by)
    layers = [axis for axis in job.arch.axes(job.model) if axis.kind == Kind.LAYER]
    if gone:
        stays = tuple(i for i in range(choice.bank.layers) if i not in gone)
        job = job.without(Plan({layers[0].name: stays}).masks(layers), by)
    return job
