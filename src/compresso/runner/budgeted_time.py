"""Of a run with a budget of time: what a forward of both models takes by the table, and what it is measured to take.

It is measured as the table was: in the same engine and phase, with the same batch, context and type of weights.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.arch.base import arch_for
from compresso.arch.costs import cost_of
from compresso.checkpoint.load import meta_model
from compresso.checkpoint.scratch import scratch_folder
from compresso.checkpoint.source import Source
from compresso.core.latency_table import LatencyTable
from compresso.core.measures import Measures
from compresso.core.plan import Plan
from compresso.edit.precision import cast_
from compresso.engines.file_times import TIMERS, FileTimer
from compresso.metrics.forwards import timed_forwards
from compresso.metrics.record import Environment, Measurement, Setting

ROUNDS = 9


def predicted(table: LatencyTable, source: Source, plan: Plan) -> tuple[Measurement, Measurement]:
    """Of the dense model and of what a plan leaves of it, what the table adds up to.

    Args:
        table: of the dense model.
        source: of that model.
        plan: everything that was removed.
    """
    dense = meta_model(source)
    cost = cost_of(arch_for(dense.config), dense, Measures(latency=table))
    found = (float(amounts.count("milliseconds")) for amounts in (cost(), cost.of(plan)))
    dense_ms, pruned_ms = (_measurement(table, ms, "estimated") for ms in found)
    return dense_ms, pruned_ms


def obstacle(table: LatencyTable, device: torch.device) -> str:
    """Why time cannot be measured where a run's models are; "" if it can."""
    if table.conditions.engine != "torch":
        return TIMERS[table.conditions.engine].missing() or ""
    there = str(table.machine.get("device"))
    return "" if str(device) == there else f"the table is of {there}, and the models are on {device}"


def timed(
    table: LatencyTable, models: Mapping[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Measurement]:
    """Time live models, in turn.

    Args:
        table: says how.
        models: name -> model, of a stock class.
        tokenizer: of all of them, for files that hold one.

    Raises:
        CompressoError: they do not fit, or the engine opens none of their files.
    """
    conditions = table.conditions
    if conditions.engine == "torch":
        dtype = getattr(torch, conditions.dtype)
        live = {
            name: model if model.dtype == dtype else cast_(copy.deepcopy(model), dtype)
            for name, model in models.items()
        }
        times = timed_forwards(live, conditions, ROUNDS)
    else:
        times = _of_files(table, TIMERS[conditions.engine], models, tokenizer)
    return {name: _measurement(table, median(one), "measured", one) for name, one in times.items()}


def _of_files(
    table: LatencyTable,
    timer: FileTimer,
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase | None,
) -> dict[str, list[float]]:
    """Milliseconds of each forward of each model, written for its engine and opened there."""
    conditions = table.conditions
    with scratch_folder() as scratch:
        paths: list[Path] = []
        for number, model in enumerate(models.values()):
            paths.append(scratch / f"{number}{timer.suffix}")
            whole = model if model.dtype == torch.float32 else copy.deepcopy(model).float()
            timer.write(whole, tokenizer, paths[-1], conditions.dtype)
        vocabulary = min(int(model.config.vocab_size) for model in models.values())
        times = timer.times(paths, conditions, ROUNDS, torch.get_num_threads(), vocabulary)
    return dict(zip(models, times, strict=True))


def _measurement(table: LatencyTable, ms: float, how: str, times: list[float] | None = None) -> Measurement:
    """A time as records hold it."""
    conditions = table.conditions
    protocol: dict[str, Setting] = {
        "engine": conditions.engine,
        "phase": conditions.phase,
        "batch": conditions.batch,
        "context": conditions.context,
        "dtype": conditions.dtype,
    }
    if times is None:
        protocol |= {"table": table.how, "measured": table.created}
    else:
        protocol |= {"forwards": len(times), "interleaved": True}
    return Measurement(
        name=f"{conditions.phase}_ms/batch{conditions.batch}",
        value=ms,
        unit="ms",
        how="estimated" if how == "estimated" else "measured",
        low=None if times is None else min(times),
        high=None if times is None else max(times),
        n=None if times is None else len(times),
        protocol=protocol,
        environment=Environment.here(str(table.machine.get("device", "cpu"))),
    )
