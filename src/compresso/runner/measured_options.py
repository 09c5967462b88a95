"""From `--milliseconds`, `--speedup` and `--bytes-at-context` to a recipe that holds what they are measured by."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from compresso.arch.base import arch_for
from compresso.arch.costs import cost_of, shape_facts
from compresso.checkpoint.load import meta_model
from compresso.checkpoint.source import Source, open_source
from compresso.core.axis import Axis
from compresso.core.budget import Budget, Shortfall, removable
from compresso.core.measures import Measures
from compresso.core.plan import Plan
from compresso.errors import BudgetError
from compresso.metrics.size import KV_BYTES
from compresso.runner.measured_budget import cost_knobs, read_table, refuse_other_table, target_of, times
from compresso.runner.output import stored_dtype
from compresso.runner.recipe import Recipe, with_knob, with_targets
from compresso.stage import Shrinks


def with_time(
    raw: Mapping[str, Any],
    model: str,
    milliseconds: float | None,
    speedup: str | float | None,
    latency_table: str | Path | None,
) -> dict[str, Any]:
    """The raw recipe with a budget of measured time, and the table that tells it.

    Args:
        raw: a recipe's mapping.
        model: whose table it is: hub id, folder, GGUF file or config.json.
        milliseconds, speedup: of which one is given.
        latency_table: the file.

    Raises:
        BudgetError: no table, or one of another model, machine or number of threads; a target outside its range.
    """
    asked = f"--milliseconds {milliseconds:g}" if milliseconds is not None else f"--speedup {speedup}"
    several = [] if speedup is None else [times(one) for one in str(speedup).split(",")]
    if any(after <= before for before, after in pairwise(several)):
        raise BudgetError(
            f"{asked}: several targets are met one after the other; wanted them rising, such as 1.2x,1.5x,2x"
        )
    source = open_source(model, weights=False)
    if getattr(source.config, "vocab_size", None) is None:
        raise BudgetError(
            f"{asked}: tables of times are of models that read tokens, and a {source.config.model_type} sees pictures;"
            " leave it out, set what the recipe keeps, and read the frames a second of the result in its report and"
            " behind compresso export --format onnx"
        )
    if latency_table is None:
        raise BudgetError(
            f"{asked} is measured time and needs --latency-table, the file that `compresso latency --output` writes;"
            " for multiply-accumulates, which measure no time, give --macs"
        )
    measures = Measures(latency=read_table(latency_table))
    assert measures.latency is not None
    shaped = meta_model(source)
    arch = arch_for(shaped.config)
    refuse_other_table(measures, shape_facts(arch, shaped))
    dense = float(cost_of(arch, shaped, measures)().count("milliseconds"))
    wanted = target_of(measures.latency, dense, milliseconds, several[-1] if several else None)
    raw = with_knob(with_knob(raw, "keep", wanted / dense, asked=asked), "of", "milliseconds", asked=asked)
    if len(several) > 1:
        raw = with_targets(raw, {f"{one:g}x": 1 / one for one in several}, asked)
    return {**raw, "cost": cost_knobs(measures)}


def with_bytes_at_context(raw: Mapping[str, Any], model: str, context: int) -> dict[str, Any]:
    """The raw recipe whose budgets are shares of the bytes of weights, as stored, and of one sequence's cache.

    Args:
        raw: a recipe's mapping.
        model: as for `with_time`.
        context: tokens in the cache.

    Raises:
        BudgetError: for fewer than one token.
    """
    if context < 1:
        raise BudgetError(f"--bytes-at-context {context}: tokens in the cache; wanted at least 1, such as 4096")
    source = open_source(model, weights=False)
    measures = Measures(context=context, weight_bytes=_stored_bytes(source), cache_bytes=KV_BYTES)
    asked = f"--bytes-at-context {context}"
    return {**with_knob(raw, "of", "bytes_at_context", asked=asked), "cost": cost_knobs(measures)}


def _stored_bytes(source: Source) -> float:
    """Of a weight: as the checkpoint stores it, else as its config says, else of 16 bits."""
    if source.tensors:
        return float(stored_dtype(source).itemsize)
    return float(getattr(source.config.dtype, "itemsize", 2))


def check_floor(recipe: Recipe, source: Source, asked: Mapping[str, object]) -> None:
    """Refuse a target that is faster than what the recipe's stages can leave.

    Args:
        recipe: with its budget of milliseconds.
        source: the model; its shapes are enough.
        asked: the options that were given, for the message.

    Raises:
        BudgetError: naming the floor, and what it consists of.
    """
    table = recipe.measures.latency
    if table is None:
        return
    shaped = meta_model(source)
    arch = arch_for(shaped.config)
    cost = cost_of(arch, shaped, recipe.measures)
    dense = float(cost().count("milliseconds"))
    for name, stage in recipe.stages:
        budget = stage.budget() if isinstance(stage, Shrinks) else None
        if budget is None or budget.of != "milliseconds":
            continue
        try:
            least = float(cost.of(_smallest(arch.axes(shaped), budget)).count("milliseconds"))
        except ValueError as error:  # of kinds that the table does not tell
            raise BudgetError(f"stage '{name}': {error}") from error
        wanted = budget.keep * dense
        if wanted < least:
            told = next(f"{option} {value}" for option, value in asked.items() if value is not None)
            kinds = ", ".join(budget.kinds)
            cause = (
                f"stage '{name}' is to come down to {wanted:.4g} ms, below its floor of {least:.4g} ms:"
                f" {table.fixed:.4g} ms of embeddings and head, which stay, and {least - table.fixed:.4g} ms that kinds"
                f" {kinds} may not remove"
            )
            most = dense / (least * 1.005)
            several = f"give targets of at most {most:.4g}x" if "," in told else ""
            raise BudgetError(
                f"{told}: {cause}; {several or f'give --milliseconds {least * 1.005:.4g} or more'}",
                Shortfall(budget.keep, least * 1.005 / dense, cause),
            )


def _smallest(axes: Sequence[Axis], budget: Budget) -> Plan:
    """What a budget's floors and multiples leave at least."""
    least = {
        axis.name: budget.allowed(axis.kind, axis.size, budget.fewest(axis))[0] for axis in removable(axes, budget)
    }
    return Plan({name: tuple(range(n)) for name, n in least.items()})
