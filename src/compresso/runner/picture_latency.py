"""What a model of pictures takes on this machine at several widths, for `compresso latency`: time of a picture in this
process, memory in one of its own, and multiply-accumulates.

Each network has the model's shapes with a share of every layer's channels, as the stage `filter_pruning` leaves them
(the next smaller one that the config holds), and weights of no meaning. One without a head is given one for two
classes.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import torch
from transformers import PreTrainedModel

from compresso.arch.base import arch_for
from compresso.checkpoint.kinds import from_config
from compresso.checkpoint.source import Source
from compresso.core.cost import CostModel
from compresso.core.picture_table import PictureTable, Width
from compresso.edit.shrink import shrink_
from compresso.errors import ArchError, DataError
from compresso.formats.plain import plain_obstacle
from compresso.metrics.frames import frame_measurements
from compresso.metrics.record import Environment
from compresso.runner.dry_budget import dry_run_plan
from compresso.runner.dry_run import SOME_LABELS
from compresso.runner.measured_budget import machine_here
from compresso.runner.picture_budget import picture_facts
from compresso.runner.picture_memory import picture_memory
from compresso.runner.recipe import build
from compresso.tasks.base import Task, tasks

_STAGE = "filter_pruning"


def picture_table(
    source: Source,
    levels: int,
    rounds: int,
    dtype: torch.dtype,
    device: torch.device,
    advance: Callable[[str], None],
) -> PictureTable:
    """The table of a model of pictures.

    Args:
        source: its shapes.
        levels: networks, from the dense one down in equal steps; at least 2.
        rounds: timed ones, in which networks take turns.
        dtype: of the weights.
        device: where they run.
        advance: told what is done behind each network, and behind all.

    Raises:
        DataError: fewer than two levels.
        ArchError: a model without a task of pictures, or channels, or whose config holds one width alone.
    """
    if levels < 2:
        raise DataError(f"--levels {levels}: a model of pictures is measured at two widths or more")
    task, models, macs = _task(source), dict[str, PreTrainedModel](), dict[str, float]()
    for level in range(levels, 0, -1):
        share, model, count = _writable(source, task, round(100 * level / levels))
        moved: Any = model  # the library's wrapper hides the signature
        models[f"{share:g}"], macs[f"{share:g}"] = moved.to(device=device, dtype=dtype).eval(), count
    if len(models) < 2:
        raise ArchError(f"{source.name}: its config holds no two of {levels} widths; give a model with more channels")
    peaks = dict[str, float]()
    for name, model in models.items():
        peaks[name] = float(picture_memory(model).value)
        advance("peak memory")
    frames = frame_measurements(models, rounds=rounds)
    advance("time of a picture")
    widths = [Width(float(name), macs[name], 1e3 / found[0].value, peaks[name]) for name, found in frames.items()]
    return PictureTable(
        picture_facts(source, task.name),
        machine_here(str(device)),
        str(dtype).removeprefix("torch."),
        tuple(widths),
        datetime.now(UTC).isoformat(timespec="seconds"),
        dict(Environment.here(device).versions),
    )


def _task(source: Source) -> Task:
    """The task of pictures whose head the model has, else one that it can be given a head for."""
    able = [task for task in tasks().values() if not task.reads_text and not task.obstacle(source.config)]
    headed = [task for task in able if not task.lacks_head(source.config)]
    found = headed or [task for task in able if task.name == "segmentation"] or able
    if not found:
        raise ArchError(f"{source.name}: no task of pictures is known for a {source.config.model_type}")
    return found[0]


def _writable(source: Source, task: Task, hundredths: int) -> tuple[float, PreTrainedModel, float]:
    """The largest share of so many hundredths or less that a config holds, its network, and its multiply-accumulates.

    Raises ArchError where there is none.
    """
    for tried in range(hundredths, 0, -1):
        shaped, _ = _narrower(source, task, tried / 100, torch.device("meta"))
        if plain_obstacle(shaped, arch_for(shaped.config).shapes(shaped)) is None:
            model, macs = _narrower(source, task, tried / 100, torch.device("cpu"))
            return tried / 100, model, macs
    raise ArchError(f"{source.name}: its config holds no narrower network; give another model")


def _narrower(source: Source, task: Task, share: float, where: torch.device) -> tuple[PreTrainedModel, float]:
    """On a device, a network with a share of all layers' channels, and its multiply-accumulates. Raises BudgetError."""
    raw: dict[str, Any] = {"task": task.name, "stages": [{_STAGE: {"keep": share}}]}
    ((_, stage),) = build(raw, "latency").stages
    with torch.random.fork_rng(devices=[]), where:
        torch.manual_seed(0)
        model = from_config(source.config, dtype=torch.float32)
        if task.lacks_head(source.config):
            model = task.with_head(model, SOME_LABELS, 0)
    arch = arch_for(model.config)
    axes = arch.axes(model)
    cost: Any = CostModel(axes, arch.weights(model))
    shrinks: Any = stage  # it says what it leaves
    _, plan = dry_run_plan(_STAGE, axes, cost, shrinks)
    macs = float(cost.of(plan).macs)
    shrink_(model, axes, plan)
    return model, macs
