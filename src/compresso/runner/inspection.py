"""What can be removed from a model, counted without its weights."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from compresso.arch.base import Arch, arch_for
from compresso.arch.context import macs_of
from compresso.arch.moe_config import PER_TOKEN
from compresso.checkpoint.kinds import is_causal
from compresso.checkpoint.load import meta_model
from compresso.checkpoint.source import Source, open_source, unfit_weights
from compresso.core.axis import Kind
from compresso.core.cost import CostModel
from compresso.core.score import parameters_per_unit
from compresso.discover.axes import discover
from compresso.discover.explain import explain, explain_axis
from compresso.discover.found import Discovery, Found
from compresso.door import public
from compresso.edit.stock import as_stock
from compresso.errors import ArchError
from compresso.metrics.size import counts
from compresso.runner.task_options import keeps_heads

log = logging.getLogger(__name__)


@public
def inspect(model: str | Path | PreTrainedModel, explained: str | None = None) -> dict[str, Any]:
    """Counts and axes of a hub id, a folder, a GGUF file, a config.json or a live model; `explained` adds what leaves
    with one axis, and why.

    Returns:
        `{"architecture", "parameters": {"total", "blocks", "embeddings", "norms"}, "axes": [{"kind", "count", "size",
        "parameters_per_unit"}], "macs_per_token", "kv_bytes_per_token"}`. `size` and `parameters_per_unit` are lists
        where layers differ. `parameters_per_unit` is what leaves the model with one unit of the dense model, embeddings
        and norms included; heads that a config cannot count say in "stays" when they stay. For an architecture nobody
        described the axes are found from a trace, of the parameters only the total is counted, and "stays" says which
        dimensions cannot leave. Of a mixture of experts "parameters" has those of "experts", too, and "active" ones,
        which a token meets, and "experts" has {"layers", "each", "per_token"}, and "fewest" where layers have unequal
        numbers, of which "each" is the largest; one that nobody described is not traced but counted. `explained` adds
        "explained"; see `compresso.discover.explain`. It may be an axis, a kind, whose first axis is explained, or a
        parameter that stays.

    Raises:
        CheckpointError: if there is no such model or it is unsafe to read.
        ArchError: if nobody described its architecture and a trace cannot prove its axes, or no axis is called as
            `explained` says.
    """
    if isinstance(model, PreTrainedModel):
        return facts_of(as_stock(model), explained)
    source = open_source(model, weights=False, packed=True)
    warn_of_damage(source)
    return facts_of(meta_model(source), explained)


def warn_of_damage(source: Source) -> None:
    """Say that the weights of a folder, which are not needed to count, are such as a run refuses."""
    if (why := unfit_weights(source)) is not None:
        log.warning("%s What is counted here is what the config says.", why)


def facts_of(live: PreTrainedModel, explained: str | None = None) -> dict[str, Any]:
    """The dictionary of `inspect` for a live model of a stock class (the meta device will do)."""
    arch = _described(live)
    if arch is not None:
        arch.shapes(live)  # what is no plain network of its kind is refused in words of its own
    mixture = count_experts(live)
    if mixture is not None:
        if explained is not None:
            raise ArchError(
                f"{live.config.model_type} is a mixture of experts, whose choice of experts no trace follows, so that"
                f" nothing explains '{explained}'; leave --explain out"
            )
        return mixture if arch is None else with_experts(describe(live, arch), mixture)
    traced = discover(live) if arch is None or explained else None
    facts = describe(live, arch) if arch else describe_traced(live, traced) if traced else {}
    return {**facts, "explained": _explained(live, arch, traced, explained)} if traced and explained else facts


def _explained(model: PreTrainedModel, arch: Arch | None, traced: Discovery, name: str) -> dict[str, Any]:
    """What is said of an axis, of the first one of a kind, or of a parameter that stays; see
    `compresso.discover.explain`. Raises ArchError where nothing is called so.
    """
    described = {axis.name: axis for axis in (arch.axes(model) if arch else ())}
    if name not in described:
        first = [one.name for one in (*traced.found, *described.values()) if str(one.kind) == name]
        name = next((one for one in first if one != name), name)
    if name in described and all(found.name != name for found in traced.found):
        return explain_axis(described[name])
    kinds = (str(one.kind) for one in (*traced.found, *described.values()))
    return explain(traced, name, [*described, *kinds])


def _described(model: PreTrainedModel) -> Arch | None:
    """The architecture's description, None if there is none."""
    try:
        return arch_for(model.config)
    except ArchError:
        return None


def count_experts(model: PreTrainedModel) -> dict[str, Any] | None:
    """The dictionary of `inspect` for a mixture of experts, counted from shapes alone; None for any other model."""
    banks = {name: module for name, module in model.named_modules() if name.rpartition(".")[2] == "experts"}
    held = {name: [tuple(one.shape) for one in bank.parameters()] for name, bank in banks.items()}
    sizes = {name: sum(map(math.prod, shapes)) for name, shapes in held.items() if shapes}
    if not sizes:
        return None
    each = {
        name: len(bank) if isinstance(bank := banks[name], nn.ModuleList) else held[name][0][0] for name in sizes
    }  # apart, or stacked in tensors whose first dimension counts them
    least, most = min(each.values()), max(each.values())
    fewest = {} if least == most else {"fewest": least}
    config = model.config.get_text_config()
    per_token = next((int(one) for name in PER_TOKEN if isinstance(one := getattr(config, name, None), int)), None)
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(sizes.values())
    ends: list[Any] = [part for part in (model.get_input_embeddings(), _head(model)) if part is not None]
    tables = {id(part.weight): part.weight.numel() for part in ends}
    parameters = {"total": total, "experts": experts, "embeddings": sum(tables.values())}
    if per_token is not None:
        parameters["active"] = total - experts + sum(sizes[name] * per_token // n for name, n in each.items())
    return {
        "architecture": model.config.model_type,
        "parameters": parameters,
        "experts": {"layers": len(sizes), "each": most, "per_token": per_token} | fewest,
        "axes": [],
        "stays": ["all of it: nothing is removed from a mixture of experts here"],
    }


def with_experts(facts: dict[str, Any], mixture: dict[str, Any]) -> dict[str, Any]:
    """What a described mixture of experts is, with what was counted of its experts."""
    counted = {name: mixture["parameters"][name] for name in ("experts", "active") if name in mixture["parameters"]}
    return {**facts, "parameters": facts["parameters"] | counted, "experts": mixture["experts"]}


def _head(model: PreTrainedModel) -> Any:
    """The output embeddings; None for a model without."""
    try:
        return model.get_output_embeddings()
    except NotImplementedError:  # encoders without one raise it
        return None


def describe_traced(model: PreTrainedModel, discovery: Discovery) -> dict[str, Any]:
    """The dictionary of `inspect` for a model whose axes were found from a trace."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    rows: list[dict[str, Any]] = []
    for kind in Kind:
        of_kind = [found for found in discovery.found if found.kind == kind]
        if of_kind:
            sizes, units = [found.size for found in of_kind], [_entries_per_unit(found, shapes) for found in of_kind]
            rows.append(
                {
                    "kind": str(kind),
                    "count": len(of_kind),
                    "size": _one_or_all(sizes),
                    "parameters_per_unit": _one_or_all(units),
                }
            )
    total = sum(math.prod(shape) for shape in shapes.values())
    stays = [str(fixed) for fixed in discovery.fixed]
    return {"architecture": model.config.model_type, "parameters": {"total": total}, "axes": rows, "stays": stays}


def _entries_per_unit(found: Found, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Parameters that leave with one unit, on average where units differ (whole sub-layers)."""
    left = {owner.param: list(shapes[owner.param]) for owner in found.owners}
    for owner in found.owners:
        left[owner.param][owner.dim] -= len(owner.unit_of) // found.size
    sliced = sum(math.prod(shapes[name]) - math.prod(sizes) for name, sizes in left.items())
    return sliced + sum(math.prod(shapes[part.param]) for part in found.whole) // found.size


def describe(model: PreTrainedModel, arch: Arch) -> dict[str, Any]:
    """The dictionary of `inspect` for a live model (the meta device will do)."""
    axes = arch.axes(model)
    cost = CostModel(axes, arch.weights(model))
    per_unit = parameters_per_unit(axes, cost, of="total")
    rows: list[dict[str, Any]] = []
    for kind in Kind:
        of_kind = [axis for axis in axes if axis.kind == kind]
        if of_kind:
            sizes = [axis.size for axis in of_kind]
            units = [round(per_unit[axis.name]) for axis in of_kind]
            rows.append(
                {
                    "kind": str(kind),
                    "count": len(of_kind),
                    "size": _one_or_all(sizes),
                    "parameters_per_unit": _one_or_all(units),
                    **({"stays": stays} if kind == Kind.HEAD and (stays := _heads_stay(model)) else {}),
                }
            )
    return {"architecture": arch.name, **counts(cost), **macs_of(model), "axes": rows}


def _heads_stay(model: PreTrainedModel) -> str:
    """When a run removes no heads of a model, and why; "" where it may."""
    if is_causal(model.config) or not keeps_heads(model.config):
        return ""
    family = model.config.model_type
    return f"all stay as long as the hidden dimensions do: a {family} config cannot say that some are gone"


def _one_or_all(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values
