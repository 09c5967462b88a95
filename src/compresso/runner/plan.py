"""What a recipe would leave of a model, and what each of its stages would take: tokens, passes, FLOPs, time, memory.

Everything comes from a dry run. FLOPs count the passes over the model and, where experts are merged, the products that
align their channels, and nothing else; they, time and memory are estimates, and named so.
"""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from compresso.arch.context import tokens_of_picture, unit_of_picture
from compresso.checkpoint.patched import weights_alone
from compresso.checkpoint.source import Source, open_source
from compresso.runner.acted import Acted, DryRun
from compresso.runner.activations import activation_bytes
from compresso.runner.data_facts import data_facts
from compresso.runner.devices import REACHED, planned
from compresso.runner.dry_run import dry_run
from compresso.runner.engine_shapes import (
    misfits,
    multiples,
    parse_engine,
    removes_queries,
    without_multiple,
    words,
)
from compresso.runner.examples import within_context
from compresso.runner.inspection import warn_of_damage
from compresso.runner.options import recipe_for
from compresso.runner.plan_devices import GRADIENT_BYTES, TRAINED_BYTES, flops_of_each, room, spread_bytes
from compresso.runner.plan_storage import compressed_facts, packed_bytes
from compresso.runner.preflight import refuse_layout
from compresso.runner.task_options import keeps_heads
from compresso.runner.trust_check import Trust
from compresso.runner.trust_cost import timed, trust_costs, trust_files
from compresso.stage import Learning, Passes, refuse_together
from compresso.stage.cached_teaching import GAP_PLACES
from compresso.tasks.base import DEFAULT
from compresso.training.teacher_store import bytes_of


def _engine_costs(
    raw: Mapping[str, Any], model: str, source: Source, layout: str, engine: str, shown: DryRun
) -> list[str]:
    """What each constraint of an engine does to the size, in sentences; the others hold meanwhile."""
    want = parse_engine(engine)
    held = multiples(want, model, removes_queries(raw))
    told: list[str] = []
    for kind, multiple in held.items():
        recipe = recipe_for(without_multiple(raw, kind, multiple), layout, source.config)
        free = dry_run(recipe, source).after["parameters"]["total"]
        told.append(f"{words(want, kind, multiple)}: {shown.after['parameters']['total'] - free:+,} parameters")
    if want.uniform:
        told.append(f"{engine}: the same widths in every layer; a plan shows them in any case")
    return told + misfits(want, held, model)


def plan(
    raw: Mapping[str, Any],
    model: str,
    layout: str = "auto",
    engine: str | None = None,
    *,
    data: str | None = None,
    skip_bad: bool = False,
    allow_dropped: bool = False,
    device: str = "auto",
    trust: Trust = "none",
    prompts: str | Path | None = None,
    benign: str | Path | None = None,
) -> dict[str, Any]:
    """What a recipe would leave of a model, and what it would take.

    Args:
        raw, model, layout: as for a run.
        engine: what the recipe's budgets were held to (see `compresso.runner.engine_shapes`); the notes then say what
            each constraint costs.
        data: names and files, as for a run; None reads none.
        skip_bad: leave bad lines of them out.
        allow_dropped: whether the run would go on where too much of them is dropped.
        device: of this machine, one of `compresso.runner.devices.DEVICES`, or several of these, such as "8xh100", with
            a process each.
        trust, prompts, benign: what is counted of the suites of trust; see `compresso.runner.trust_cost`.

    Returns:
        {"recipe", "model", "before", "after", "shapes", "notes", "layouts", "weight_bytes", "counted_by", "device",
        "stages", "training", "compressed", "data", "trust"}. "counted_by" is "token", or of models of pictures
        "picture", or "patch" where they cut it. "data" is None where none was given, else as `data_facts` gives it.
        `after`, `shapes` and `layouts` are those of equal widths in every layer, where equal ones meet the budget:
        methods that learn or score choose others of the same total.
        "stages" holds what each stage runs through its model, "training" what those that train hold in memory,
        "compressed" what those that zero or round do to how many weights. "weight_bytes" has "packed" where weights are
        rounded. Of several devices, rows of "training" have "memory_bytes_spread" where FSDP 2 spreads the model: what
        each holds in "training", and "around" it. "trust" has a row for each suite that was asked for. Numbers that
        depend on the length of the data are null.

    Raises:
        CompressoError: as `run` would, for everything that can be known without weights and data.
    """
    source = open_source(model, weights=False)
    warn_of_damage(source)
    recipe = recipe_for(raw, layout, source.config)
    files = trust_files(recipe.task, trust, prompts, benign)
    where = planned(device)
    refuse_together([act.name for act in recipe.acts], where.count)
    recipe = within_context(recipe, source.config)  # what a run reads: no longer than the model does
    shown = dry_run(recipe, source, where.count if where.known else None)
    refuse_layout(shown, layout, source)
    found = None
    if data is not None:
        found = data_facts(recipe, raw, data, source, shown.stages, skip_bad=skip_bad, allow_dropped=allow_dropped)
    if engine is not None:
        shown.notes += _engine_costs(raw, model, source, layout, engine, shown)
    stored = _width(source.config)
    length = recipe.data.max_length if recipe.task.reads_text else tokens_of_picture(source.config)
    width = stored if where.computes_in != torch.float32 else 4
    on_host = where.known is None and (where.here is None or where.here.type == "cpu")
    stages = [_cost(one, shown.before, length, width, on_host) for one in shown.stages]
    training = [
        _training(one, one.learning, shown.before, length, width, where.count)
        for one in shown.stages
        if one.learning is not None
    ]
    for row, one in zip(training, (one for one in shown.stages if one.learning is not None), strict=True):
        row["disk_bytes_at_most"] = _kept_bytes(one, length, width, None if found is None else found["train"])
    asked = trust_costs(source, files)
    if asked or any(one["flops_at_most"] for one in stages):
        rate = where.known.flops * REACHED if where.known else matmul_rate(where.here or torch.device("cpu"))
        for one, acted in zip(stages, shown.stages, strict=True):
            flops = flops_of_each(acted, one["passes"], where.count)
            aligning = _aligned(one, acted, rate)
            one["seconds_estimated"] = None if flops is None else round(flops / rate + aligning, 1)
        for one in training:
            flops = one["flops_at_most"]
            one["seconds_estimated"] = None if flops is None else round(flops / where.count / rate, 1)
        models = {
            name: (side["macs_per_token"], side["parameters"]["total"] * width)
            for name, side in (("dense", shown.before), ("smaller", shown.after))
        }
        asked = [timed(one, models, rate, where) for one in asked]
    facts = (compressed_facts(one, width) for one in shown.stages)
    compressed = [one for one in facts if one is not None]
    packed = packed_bytes(shown.after["parameters"]["total"], stored, compressed)
    if where.known is not None:
        beside = [one for one in stages if one["memory_bytes_estimated"] is not None]
        shown.notes += room(where, [*training, *compressed, *beside], shown.stages)
    shown.notes += weights_alone(source)
    if recipe.task.lacks_head(source.config):
        shown.notes.append(f"counted with {recipe.task.head}")
    fewer = any(name.endswith(".heads") and kept < size for name, (kept, size) in shown.shapes.items())
    if recipe.task.name != DEFAULT and keeps_heads(source.config) and not fewer:  # HomoDistil's leave with their width
        shown.notes.append(f"all heads stay: a {source.config.model_type} config cannot say that some are gone")
    return {
        "recipe": recipe.name,
        "model": source.name,
        "before": shown.before,
        "after": shown.after,
        "shapes": shown.shapes,
        "notes": shown.notes,
        "layouts": shown.layouts,
        "weight_bytes": {
            "before": shown.before["parameters"]["total"] * stored,
            "after": shown.after["parameters"]["total"] * stored,
            **({} if packed is None else {"packed": packed}),
        },
        "counted_by": "token" if recipe.task.reads_text else unit_of_picture(source.config),
        "device": where.name,
        "stages": stages,
        "training": training,
        "compressed": compressed,
        "data": found,
        "trust": asked,
    }


def matmul_rate(device: torch.device, size: int = 1024, times: int = 4) -> float:
    """FLOPs a second of a square matrix product on this machine, in the type that training computes in: the best of a
    few.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = size * 8 if device.type == "cuda" else size
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    seconds: list[float] = []
    for _ in range(times):
        begun = time.perf_counter()
        torch.mm(matrix, matrix)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / min(seconds)


def _cost(one: Acted, dense: Mapping[str, Any], length: int, width: int, on_host: bool) -> dict[str, Any]:
    """What a stage runs through its model: tokens of at most `length` an example, passes, FLOPs; what it merges; and
    the memory of what trains nothing but merges experts, or wants the dense model beside its own, at `width` bytes a
    number; on_host: whether the weights lie where experts are assigned to each other.
    """
    beside = one.learning is None and any(passed.dense for passed in one.passes)
    merging = one.merging
    aligning = merging.held + merging.assigned * on_host if merging else 0
    held = dense["parameters"]["total"] if beside else 0
    passes = [
        {
            "what": passed.what,
            "examples_at_most": passed.examples,
            "tokens_at_most": _times(passed.examples, length),
            "forwards": passed.forwards,
            "backwards": passed.backwards,
            "flops_at_most": _times(
                _times(passed.examples, length), flops_per_token(passed, one.macs, dense["macs_per_token"], length)
            ),
        }
        for passed in one.passes
    ]
    return {
        "stage": one.name,
        "passes": passes,
        "forward_tokens_at_most": _sum(_times(row["tokens_at_most"], row["forwards"]) for row in passes),
        "backward_tokens_at_most": _sum(_times(row["tokens_at_most"], row["backwards"]) for row in passes),
        "flops_at_most": _sum([*(row["flops_at_most"] for row in passes), merging.flops if merging else 0]),
        "seconds_estimated": None,
        "memory_bytes_estimated": (one.parameters + held) * width + aligning if beside or merging else None,
        "merging": merging
        and {
            "experts": merging.experts,
            "width": merging.width,
            "flops": merging.flops,
            "seconds_estimated": None,
            "bytes_beside": aligning,
            "bytes_of_host": merging.assigned,
        },
    }


def _aligned(one: dict[str, Any], acted: Acted, rate: float) -> float:
    """Seconds that merging takes in a stage, which its row then says; 0 where nothing is merged."""
    if acted.merging is None:
        return 0.0
    found = acted.merging.flops / rate + acted.merging.seconds_of_assignments()
    one["merging"]["seconds_estimated"] = round(found, 1)
    return found


def flops_per_token(passed: Passes, macs: int, dense_macs: int, length: int) -> float:
    """Of passes over a model of `macs` multiply-accumulates a token: 2 forward, 2 for gradients of activations, and 2
    more where those of weights are taken. length: tokens of an example, among which another model's passes are shared.
    """
    backward = 4 if passed.weights else 2
    each = passed.other.macs / length if passed.other else dense_macs if passed.dense else macs
    return each * (2 * passed.forwards + backward * passed.backwards)


def _times(count: float | None, factor: float) -> int | None:
    return None if count is None else round(count * factor)


def _sum(counts: Iterable[int | None]) -> int | None:
    """The sum of counts, None if one of them is not known."""
    known = list(counts)
    return None if None in known else sum(count for count in known if count is not None)


def _training(
    one: Acted, learning: Learning, dense: Mapping[str, Any], length: int, width: int, count: int
) -> dict[str, Any]:
    """A training stage's length, tokens and FLOPs, and the memory of each of `count` devices."""
    trains, updates = learning.trains, learning.updates
    tokens = _times(updates, trains.batch * length)
    at_once = min(trains.micro_batch, trains.batch // count) * length
    teacher = learning.parameters_of_teacher(dense["parameters"]["total"])
    at_a_time = one.parameters + teacher if learning.cached is None else max(one.parameters, teacher)
    memory = {
        "weights": at_a_time * width,
        "trained": sum(one.trainable.values()) * TRAINED_BYTES,
        "activations": activation_bytes(one.config, at_once, width, trains.checkpointing, learning.chunk),
    }
    if count > 1:
        memory["exchanged"] = sum(one.trainable.values()) * GRADIENT_BYTES
    per_token = sum(flops_per_token(passed, one.macs, dense["macs_per_token"], length) for passed in learning.passes())
    spread = spread_bytes(one, dense["parameters"], width, memory["activations"], count)
    return {
        "stage": one.name,
        "duration": " + ".join(str(phase) for phase in learning.phases),
        "rounds": 1 if one.act is None or (one.act.steps and one.act.steps.names) else one.act.turns,
        "updates": updates,
        "trainable": dict(one.trainable),
        "tokens_at_most": tokens,
        "flops_at_most": _times(tokens, per_token),
        "seconds_estimated": None,
        "memory_bytes_estimated": {**memory, "total": sum(memory.values())},
        **({} if spread is None else {"memory_bytes_spread": spread}),
    }


def _kept_bytes(one: Acted, length: int, width: int, rows: int | None) -> int | None:
    """What a cached teacher takes on disk: what it says of each token of the rows that will be seen, its distributions
    at the few held-out places, and meanwhile the student; None without one, and where the data decides.

    rows: of training, where the data is known.
    """
    learning = one.learning
    if learning is None or learning.cached is None:
        return None
    known = [n for n in (rows, _times(learning.updates, learning.trains.batch)) if n is not None]
    if not known:
        return None
    outcomes = int(one.config.vocab_size)
    held = bytes_of(GAP_PLACES, outcomes, outcomes)
    return bytes_of(min(known) * length, learning.cached, outcomes) + held + one.parameters * width


def _width(config: PreTrainedConfig) -> int:
    """Bytes of a stored number; 4 where the config names no dtype."""
    dtype = config.dtype
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 4
