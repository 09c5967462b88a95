"""`compresso plan`: what a recipe would make of a model, from its config alone."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from compresso.commands.plan_table import show
from compresso.door import public
from compresso.runner import plan as dry_runs
from compresso.runner.asked_budget import said_as_asked
from compresso.runner.options import with_options
from compresso.runner.picture_budget import picture_notes
from compresso.runner.preflight import check_shapes
from compresso.runner.trust_check import Trust

__all__ = ["plan", "show"]


@public
def plan(
    recipe: str | Path | Mapping[str, Any],
    model: str | Path,
    *,
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
    layout: str = "auto",
    data: str | Path | None = None,
    skip_bad: bool = False,
    device: str = "auto",
    allow_dropped: bool = False,
    trust: Trust = "none",
    prompts: str | Path | None = None,
    benign: str | Path | None = None,
) -> dict[str, Any]:
    """A dry run without weights: predicted shapes, counts, memory, tokens and time.

    Args:
        recipe: a shipped recipe's name, a YAML file, or the raw mapping of one.
        model: hub id, local folder, GGUF file or config.json.
        keep, parameters, macs, milliseconds, speedup, latency_table, memory, bytes_at_context, max_steps, sets, target,
            task, layout, skip_bad, allow_dropped: as for `compresso.run`.
        data: as for `compresso.run`; None reads none.
        device: what time and memory are estimated for: "auto", "cpu", "cuda", or a GPU that need not be here, such as
            "h100" or "rtx4090", or several with a process each, such as "8xh100".
        trust: as for `compresso.run`: what asking both models would take.
        prompts, benign: files of the suite "refusal" of `compresso.evaluate`: what asking both models would take.

    Returns:
        What `compresso plan --json` prints: `{"recipe", "model", "before", "after", "shapes", "notes", "layouts",
        "weight_bytes", "device", "stages", "training", "compressed", "data", "trust"}`.

    Raises:
        CompressoError: for all that the run would refuse before it reads weights.
    """
    given = None if data is None else str(data)
    options: dict[str, Any] = {
        "keep": keep,
        "parameters": parameters,
        "macs": macs,
        "milliseconds": milliseconds,
        "speedup": speedup,
        "latency_table": latency_table,
        "memory": memory,
        "bytes_at_context": bytes_at_context,
        "max_steps": max_steps,
        "sets": sets,
        "target": target,
        "task": task,
        "data": given,
        "layout": layout,
    }
    with said_as_asked(options, partial(check_shapes, recipe, str(model), layout)):
        raw = with_options(recipe, model=str(model), **options)
        facts = dry_runs.plan(
            raw, str(model), layout, target, data=given, skip_bad=skip_bad, allow_dropped=allow_dropped, device=device,
            trust=trust, prompts=prompts, benign=benign,
        )  # fmt: skip
    if latency_table is not None:
        facts["notes"] += picture_notes(raw, str(model), latency_table, facts)
    return facts
