"""The commands that make models smaller, and say beforehand how: demo, methods, recipes, inspect, plan and run.

Each parses its options, calls the function that does the work, and prints what that returns.
"""

from pathlib import Path
from typing import Annotated

import typer

from compresso.cli.app import app
from compresso.cli.options import (
    AllowCollapsed,
    AllowDropped,
    BytesAtContext,
    Device,
    For,
    Force,
    Json,
    Keep,
    LatencyTable,
    Layout,
    Macs,
    MaxSteps,
    Measure,
    Memory,
    Milliseconds,
    Overwrite,
    Parameters,
    Recipe,
    Seed,
    Set,
    SkipBad,
    Speedup,
    Stream,
    Target,
    Task,
    Trust,
    warn_of,
)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where the checkpoints and the table go.")] = Path("demo-output"),
    keep: Annotated[
        float | None, typer.Option(help="Share of block parameters that stays; 0.7, or 0.8 of a model of your own.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A chat model, such as a small GGUF, to show it on instead: it trains on its own answers."),
    ] = None,
    overwrite: Overwrite = False,
    allow_collapsed: AllowCollapsed = False,
    force: Force = False,
) -> None:
    """The main job on the embedded model, offline: prune, recover, reload, compare.

    Example: compresso demo --output demo-output
    """
    if force:
        warn_of("--force", "--overwrite, --allow-collapsed or both")
    if model is not None:
        from compresso.commands import demo_real

        demo_real.demo_real(model, output, keep=0.8 if keep is None else keep, overwrite=overwrite or force)
        return
    from compresso.commands import demo

    share = 0.7 if keep is None else keep
    demo.demo(output, keep=share, overwrite=overwrite or force, allow_collapsed=allow_collapsed or force)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method in full.")] = None, as_json: Json = False
) -> None:
    """The catalogue: what each method removes, needs, when to use it and how it fails.

    Example: compresso methods learn_gates
    """
    from compresso.commands import catalogue

    catalogue.show_methods(name, as_json)


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="One recipe in full.")] = None) -> None:
    """The recipes that ship, or one in full.

    Example: compresso recipes compresso/paper
    """
    from compresso.commands import catalogue

    catalogue.show_recipes(name)


@app.command()
def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hub id, local folder of safetensors, GGUF file, or a config.json.")
    ],
    as_json: Json = False,
    explain: Annotated[
        str | None,
        typer.Option(metavar="AXIS", help="Also which tensors leave with this axis, or the first of this kind."),
    ] = None,
) -> None:
    """What can be removed from a model: axes, units, parameters a unit. Reads no weights.

    Example: compresso inspect meta-llama/Llama-2-7b-hf
    """
    from compresso.commands import inspect

    inspect.show(inspect.inspect(model, explain), as_json)


@app.command()
def plan(
    recipe: Recipe,
    model: Annotated[str, typer.Option(help="Hub id, local folder or config.json.")],
    keep: Keep = None,
    parameters: Parameters = None,
    macs: Macs = None,
    milliseconds: Milliseconds = None,
    speedup: Speedup = None,
    latency_table: LatencyTable = None,
    memory: Memory = None,
    bytes_at_context: BytesAtContext = None,
    layout: Layout = "auto",
    max_steps: MaxSteps = None,
    sets: Set = None,
    target: Target = None,
    task: Task = None,
    data: Annotated[
        str | None,
        typer.Option(help="As for `run`: says how many examples and tokens survive, and how long an epoch is."),
    ] = None,
    skip_bad: SkipBad = False,
    allow_dropped: AllowDropped = False,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            "--devices",
            help=(
                "What time and memory are estimated for: auto, cpu, cuda, a GPU that is not here, such as h100, or"
                " several of these, such as 8xh100."
            ),
        ),
    ] = "auto",
    trust: Trust = "none",
    prompts: Annotated[
        Path | None,
        typer.Option(help="Harmful tasks in templates: also say what `evaluate --suite refusal` would take of them."),
    ] = None,
    benign: Annotated[Path | None, typer.Option(help="Everyday tasks in the same templates, beside --prompts.")] = None,
    as_json: Json = False,
    engine: For = None,
) -> None:
    """A dry run without weights: predicted shapes, counts, memory, tokens and time.

    Example: compresso plan compresso --model ./llama-7b/config.json --keep 0.7
    """
    from compresso.commands import plan

    facts = plan.plan(
        recipe,
        model,
        keep=keep,
        parameters=parameters,
        macs=macs,
        milliseconds=milliseconds,
        speedup=speedup,
        latency_table=latency_table,
        memory=memory,
        bytes_at_context=bytes_at_context,
        max_steps=max_steps,
        sets=sets or [],
        target=_target(target, engine),
        task=task,
        layout=layout,
        data=data,
        skip_bad=skip_bad,
        device=device,
        allow_dropped=allow_dropped,
        trust=trust,
        prompts=prompts,
        benign=benign,
    )
    plan.show(facts, as_json)


@app.command()
def run(
    recipe: Recipe,
    model: Annotated[str, typer.Option(help="Hub id, local folder of safetensors, or GGUF file.")],
    output: Annotated[Path, typer.Option(help="Folder of the new checkpoint; must not exist or be empty.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Registered name, local file (.jsonl, .json, .csv, .tsv, .txt, also .gz and .zst; .parquet), folder or"
            " pattern of files; several with commas."
        ),
    ] = None,
    keep: Keep = None,
    parameters: Parameters = None,
    macs: Macs = None,
    milliseconds: Milliseconds = None,
    speedup: Speedup = None,
    latency_table: LatencyTable = None,
    memory: Memory = None,
    bytes_at_context: BytesAtContext = None,
    layout: Layout = "auto",
    max_steps: MaxSteps = None,
    sets: Set = None,
    target: Target = None,
    task: Task = None,
    seed: Seed = 0,
    device: Device = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run to the identical result.")
    ] = False,
    overwrite: Overwrite = False,
    allow_collapsed: AllowCollapsed = False,
    skip_bad: SkipBad = False,
    allow_dropped: AllowDropped = False,
    offload: Annotated[
        bool,
        typer.Option(
            "--offload", help="Read weights from disk block by block: models larger than memory, one-shot recipes."
        ),
    ] = False,
    over_memory: Annotated[
        bool, typer.Option("--over-memory", help="Offload even if the estimate is above what is there.")
    ] = False,
    measure: Measure = "full",
    trust: Trust = "none",
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not open the result in the engines of this machine.")
    ] = False,
    as_json: Json = False,
    engine: For = None,
    stream: Stream = False,
    force: Force = False,
) -> None:
    """The job: prune, recover, write a checkpoint that loads, and record what was done.

    Example: compresso run compresso --model ./llama-7b --data alpaca-gpt4 --keep 0.7 --output ./llama-5b
    """
    from compresso.commands import run

    if force:
        warn_of("--force", "--overwrite, --allow-collapsed or both")
    if stream:
        warn_of("--stream", "--offload")
    result = run.run(
        recipe,
        model,
        data,
        output=output,
        keep=keep,
        parameters=parameters,
        macs=macs,
        milliseconds=milliseconds,
        speedup=speedup,
        latency_table=latency_table,
        memory=memory,
        bytes_at_context=bytes_at_context,
        max_steps=max_steps,
        sets=sets or [],
        target=_target(target, engine),
        task=task,
        layout=layout,
        seed=seed,
        device=device,
        resume=resume,
        overwrite=overwrite or force,
        allow_collapsed=allow_collapsed or force,
        skip_bad=skip_bad,
        allow_dropped=allow_dropped,
        offload=offload or stream,
        over_memory=over_memory,
        verify=not no_verify,
        measure=measure,
        trust=trust,
    )
    run.show(result, as_json)


def _target(target: str | None, old: str | None) -> str | None:
    """The engine that was named, by its option or by the old one."""
    if old is not None:
        warn_of("--for", "--target")
    return target or old
