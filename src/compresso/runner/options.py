"""From what was asked for to a checked recipe: budgets and overrides first, then what a layout and the model's family
want.

    with_options    a recipe's name, --keep, --set ... -> its raw mapping
    recipe_for      that mapping, --layout, a config   -> the `Recipe`, built once
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from transformers import PreTrainedConfig

from compresso.checkpoint.kinds import of_pictures
from compresso.checkpoint.load import meta_model
from compresso.checkpoint.source import open_source
from compresso.core.axis import Kind
from compresso.errors import BudgetError, RecipeError, nearest
from compresso.formats.plain import check_written
from compresso.native import family_of, mixture_family_of, staged_family_of, stock_type
from compresso.runner.asked_budget import asked_for, count
from compresso.runner.data_knobs import refuse_set
from compresso.runner.dry_run import SOME_LABELS, dry_run
from compresso.runner.engine_shapes import (
    for_engine,
    held_to,
    multiples,
    parse_engine,
    removes_queries,
    writable_heads,
    writable_queries,
)
from compresso.runner.inspection import facts_of
from compresso.runner.measured_options import check_floor, with_bytes_at_context, with_time
from compresso.runner.nearest_knob import in_place_of_memory, share_of
from compresso.runner.picture_budget import limits_of, read_picture_table, with_picture_budget
from compresso.runner.recipe import Recipe, build, names, override, read, task_of, with_knob
from compresso.runner.recipe_data import with_confined_data
from compresso.runner.recipe_file import plain, stages_of
from compresso.runner.round_knobs import TARGETS
from compresso.runner.said_twice import refuse_said_twice
from compresso.runner.target_budget import check_target
from compresso.runner.task_options import for_model, with_task
from compresso.tasks.base import DEFAULT

AskedLayout = Literal["auto", "uniform", "padded", "native"]
LAYOUTS = get_args(AskedLayout)


def with_options(
    recipe: str | Path | Mapping[str, Any],
    *,
    model: str,
    keep: float | None = None,
    parameters: str | float | None = None,
    macs: float | None = None,
    milliseconds: float | None = None,
    speedup: str | float | None = None,
    latency_table: str | Path | None = None,
    memory: str | None = None,
    bytes_at_context: int | None = None,
    max_steps: int | None = None,
    sets: Sequence[str] = (),
    target: str | None = None,
    task: str | None = None,
    data: str | None = None,
    layout: str = "auto",
) -> dict[str, Any]:
    """The raw recipe with task, budget, step cap, `path=value` overrides and the shapes that an engine wants in it.

    Args:
        recipe: a shipped recipe's name, a YAML file, or the raw mapping of one.
        model: what `parameters` and `target` are counted on: hub id, folder, GGUF file or config.json.
        keep: share that stays, in (0, 1]; of the block parameters, unless the recipe counts something else.
        parameters: all parameters wanted, such as "5.4B".
        macs: multiply-accumulates a token of the dense model over those of the smaller one, at least 1.
        milliseconds: of one forward, as the table tells them; of a model of pictures, of one picture.
        speedup: the dense model's milliseconds over the smaller one's, as the table tells them: "1.5x"; several, as in
            "1.2x,1.5x,2x", are targets of one run.
        latency_table: what `compresso latency` wrote for this model on this machine.
        memory: of a model of pictures, the most that a process takes which reads one, as the table tells it: "3.7GB".
        bytes_at_context: tokens of the cache that is counted with the weights; `keep` is a share of both.
        max_steps: cap on the updates of each training stage.
        sets: overrides such as "stages.learn_gates.mask_lr=0.02".
        target: engine whose shape constraints hold the budgets, such as "llama.cpp:q4_k".
        task: what is trained and judged by, such as "classification".
        data: given in place of the recipe's own, which is then not looked at.
        layout: which the recipe will be checked for; only compared with `sets` here.

    Raises:
        BudgetError: more than one budget, or one outside its range; a table of another model or machine.
        RecipeError: an unknown recipe or engine, an override that fits nothing, or a recipe file that names data
            outside its folder and the working folder; an option and an override of what it sets; an override of data
            that the recipe or its task does not read.
    """
    raw = with_task(recipe if isinstance(recipe, Mapping) else read(recipe), task)
    if task_of(raw).name != DEFAULT:
        raw = for_model(raw, open_source(model, weights=False).config)
    for one in sets:
        path, equals, value = one.partition("=")
        if not equals:
            raise RecipeError(f"--set {one}: wanted path=value, such as stages.learn_gates.mask_lr=0.02")
        value = plain(value, f"--set {one}: the value")
        raw = override(raw, path.strip(), value)
        refuse_set(task_of(raw), path.strip().removeprefix("data."), value, f"--set {one}")
    asked = data is not None or any(one.partition("=")[0].strip() == "data.source" for one in sets)
    if not asked and not isinstance(recipe, Mapping) and str(recipe) not in names():
        raw = with_confined_data(raw, Path(recipe))
    budgets = {
        "--keep": keep,
        "--parameters": parameters,
        "--macs": macs,
        "--milliseconds": milliseconds,
        "--speedup": speedup,
    }
    given = [name for name, value in budgets.items() if value is not None]
    if len(given) > 1:
        raise BudgetError(f"{' and '.join(given)} are two budgets; give one")
    own = [name for name, knobs in stages_of(raw) if isinstance(knobs, dict) and TARGETS in knobs]
    if own and given and "," not in str(speedup):
        raise BudgetError(
            f"{given[0]} {budgets[given[0]]} is one budget, and stage '{own[0]}' has several targets; leave it out, or"
            f" give --set stages.{own[0]}.{TARGETS}"
        )
    if bytes_at_context is not None and given not in ([], ["--keep"]):
        raise BudgetError(f"{given[0]} and --bytes-at-context are two budgets; --bytes-at-context goes with --keep")
    others = {
        "memory": memory,
        "bytes-at-context": bytes_at_context,
        "max-steps": max_steps,
        "target": target,
        "layout": layout,
    }
    refuse_said_twice(sets, {**{name[2:]: value for name, value in budgets.items()}, **others, "data": data})
    timed = milliseconds is not None or speedup is not None
    if memory is not None and (given not in ([], ["--milliseconds"]) or bytes_at_context is not None):
        other = given[0] if given else "--bytes-at-context"
        raise BudgetError(f"--memory {memory} and {other} are two budgets; the first goes with --milliseconds alone")
    pictures = (timed or memory is not None) and _of_pictures(raw, model, speedup, memory, latency_table)
    if pictures:
        assert latency_table is not None  # else it was refused
        raw = _with_pictures(raw, model, milliseconds, memory, latency_table)
        timed = False
    elif latency_table is not None and not timed:
        raise BudgetError("--latency-table is what --milliseconds and --speedup are counted by; give one of them")
    if pictures:
        pass  # its share is in the recipe
    elif timed:
        raw = with_time(raw, model, milliseconds, speedup, latency_table)
    else:
        raw = _with_budget(raw, model, keep, parameters, macs)
    if bytes_at_context is not None:
        raw = with_bytes_at_context(raw, model, bytes_at_context)
    if max_steps is not None:
        if max_steps < 1:
            raise RecipeError(f"--max-steps {max_steps}: wanted at least 1")
        raw = with_knob(raw, "max_steps", max_steps, asked=f"--max-steps {max_steps}")
    if target is not None:
        want = parse_engine(target)
        raw = for_engine(raw, want, multiples(want, model, removes_queries(raw)))
        source = open_source(model, weights=False)
        asked = asked_for({name.removeprefix("--"): value for name, value in budgets.items()})
        check_target(recipe_for(raw, "auto", source.config), source, target, asked)
    if timed:
        source = open_source(model, weights=False)
        check_floor(recipe_for(raw, "auto", source.config), source, budgets)
    idle = next((one for one in sets if one.partition("=")[0].strip().startswith("data.")), None)
    if idle is not None and not (made := build(raw, str(raw.get("name", "recipe")))).needs("data"):
        raise RecipeError(f"recipe {made.name} uses no data, but --set {idle} was given; leave it out")
    return raw


def _of_pictures(
    raw: Mapping[str, Any],
    model: str,
    speedup: str | float | None,
    memory: str | None,
    table: str | Path | None,
) -> bool:
    """Whether a budget of time or memory is one of pictures. Raises BudgetError where such a budget cannot be met."""
    config = open_source(model, weights=False).config
    if not of_pictures(config):
        if memory is not None:
            raise BudgetError(
                f"--memory {memory} is a budget of models of pictures, and a {config.model_type} reads text;"
                f" {in_place_of_memory(stages_of(raw))}"
            )
        return False
    if speedup is not None:
        raise BudgetError(f"--speedup {speedup}: give --milliseconds, as a table of a model of pictures tells them")
    if table is None:
        asked = f"--memory {memory}" if memory is not None else "--milliseconds"
        raise BudgetError(
            f"{asked} of a model of pictures is measured and needs --latency-table, the file that `compresso latency"
            " --output` writes of it on this machine"
        )
    return True


def _with_pictures(
    raw: dict[str, Any], model: str, milliseconds: float | None, memory: str | None, path: str | Path
) -> dict[str, Any]:
    """The raw recipe that meets a budget of pictures."""
    source = open_source(model, weights=False)
    table = read_picture_table(path, source, task_of(raw).name)
    words = [f"--milliseconds {milliseconds:g}"] if milliseconds is not None else []
    words += [f"--memory {memory}"] if memory is not None else []

    def macs(tried: Mapping[str, Any]) -> float:
        return float(dry_run(recipe_for(tried, "auto", source.config), source).after["macs_per_token"])

    return with_picture_budget(raw, table, limits_of(milliseconds, memory), " and ".join(words), macs)


def _with_budget(
    raw: dict[str, Any], model: str, keep: float | None, parameters: str | float | None, macs: float | None
) -> dict[str, Any]:
    """The raw recipe with the one budget of its shapes that was given in it."""
    if keep is not None:
        if not 0 < keep <= 1:  # also refuses NaN
            share = share_of(stages_of(raw))
            raise BudgetError(f"--keep {keep}: the kept share of {share} lies in (0, 1]; 0.7 removes 30 %")
        return with_knob(raw, "keep", keep, asked=f"--keep {keep:g}")
    if parameters is not None:
        wanted, total = count(str(parameters)), _total(raw, model)
        if wanted > total:
            raise BudgetError(f"--parameters {parameters}: the model has {total:,}; wanted no more than that")
        asked = f"--parameters {parameters}"
        return with_knob(with_knob(raw, "keep", wanted / total, asked=asked), "of", "total", asked=asked)
    if macs is not None:
        if not (math.isfinite(macs) and macs >= 1):
            share = f"; to keep {macs:g} of them, give {1 / macs:.4g}" if 0 < macs < 1 else ""
            raise BudgetError(
                f"--macs {macs}: the dense model's multiply-accumulates a token over those of the smaller one; wanted"
                f" at least 1, such as 1.5{share}"
            )
        asked = f"--macs {macs:g}"
        return with_knob(with_knob(raw, "keep", 1 / macs, asked=asked), "of", "macs", asked=asked)
    return raw


def _total(raw: Mapping[str, Any], model: str) -> int:
    """All parameters of a model, with the head that a recipe's task gives it."""
    source, task = open_source(model, weights=False, packed=True), task_of(raw)
    shaped = meta_model(source)
    if task.lacks_head(source.config) and not task.obstacle(source.config):
        shaped = task.with_head(shaped, SOME_LABELS, 0)
    return facts_of(shaped)["parameters"]["total"]


def recipe_for(raw: Mapping[str, Any], layout: str, config: PreTrainedConfig) -> Recipe:
    """The checked recipe for a layout, a model's family, and the head that the model lacks for the recipe's task.

    Under "uniform" every stage that can keeps equal widths. Families that have no form with widths of each layer's own
    get equal ones in any case, and counts of heads that their config can name; mixtures of experts that have one get
    them under "auto", too, since few engines read that form, unless their layers differ already. SegFormer, whose
    stages have widths of their own as it is, gets them under "uniform" alone.

    Args:
        raw: a recipe's mapping, with the options in it.
        layout: "auto", "uniform", "padded" or "native".
        config: of the model.

    Raises:
        RecipeError: an unknown layout, or as `build`.
        ExportError: a layout that the family has not.
    """
    if layout not in LAYOUTS:
        raise RecipeError(f"--layout {layout!r} is unknown; {nearest(layout, LAYOUTS)}")
    raw = for_model(raw, config)
    plain_family = family_of(config.model_type) is None
    if plain_family:
        check_written(config.model_type, layout)
    stock = stock_type(config.model_type) == config.model_type  # else its layers differ already
    equal = plain_family and stock and (layout != "native" or mixture_family_of(config.model_type) is None)
    equal = equal and staged_family_of(config.model_type) is None
    if layout == "uniform" or equal:
        raw = with_knob(raw, "layout", "uniform", required=False)
    if equal:
        counts = {Kind.HEAD: writable_heads(config), Kind.QUERY: writable_queries(config)}
        if held := {kind: multiple for kind, multiple in counts.items() if multiple > 1}:
            raw = held_to(raw, held)
    return build(raw, str(raw.get("name", "recipe")))
