"""The command line: parse, call, print. Everything it does can be done from Python with the functions it calls.

Exit codes: 0 ok, 2 bad input, 3 not enough resource, 4 numeric failure, 130/143 interrupted. Errors are one line on
stderr; an exception that nobody foresaw keeps its traceback, and exits with 1.
"""

import errno
import json
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version as installed
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import torch
import typer
from transformers.utils import logging as transformers_logging
from typer.exceptions import TyperException

from compresso.errors import CompressoError
from compresso.training.signals import Interrupted

app = typer.Typer(
    name="compresso",
    help=(
        "Makes Hugging Face language models really smaller and faster, and measures what it cost.\n\n"
        "Example: compresso demo --output demo-output"
    ),
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
ModelArg = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hub id, local folder of safetensors, or a config.json.")
]


def _version(asked: bool) -> None:
    if asked:
        print(f"compresso {installed('compresso-llm')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """The options before a command; its help text is the app's."""


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where the checkpoints and the table go.")] = Path("demo-output"),
    keep: Annotated[float, typer.Option(help="Share of block parameters that stays.")] = 0.7,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
) -> None:
    """The main job on the embedded model, offline: prune, recover, reload, compare.

    Example: compresso demo --output demo-output
    """
    from compresso.commands.demo import run_demo

    run_demo(output, keep=keep, force=force)


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
    model: ModelArg,
    as_json: Json = False,
    explain: Annotated[
        str | None, typer.Option(metavar="AXIS", help="Also which tensors leave with this axis, and why.")
    ] = None,
) -> None:
    """What can be removed from a model: axes, units, parameters a unit. Reads no weights.

    Example: compresso inspect meta-llama/Llama-2-7b-hf
    """
    from compresso.runner import inspection

    inspection.show(inspection.inspect(model, explain), as_json)


Keep = Annotated[
    float | None,
    typer.Option(help="Share that stays, in (0, 1]; of the block parameters, unless the recipe counts something else."),
]
Parameters = Annotated[str | None, typer.Option(help="Total parameters wanted, such as 5.4B.")]
Speedup = Annotated[
    float | None,
    typer.Option(help="Decode speed-up aimed at: keeps 1/S of the multiply-accumulates a token (a bound)."),
]
Layout = Annotated[
    str, typer.Option(help="uniform, padded or native; auto is uniform where the shapes allow it, else native.")
]
MaxSteps = Annotated[
    int | None, typer.Option(min=1, help="Cap on the updates of each training stage; schedules shrink with it.")
]
For = Annotated[
    str | None,
    typer.Option(
        "--for", metavar="ENGINE", help="Shapes that an engine likes, such as llama.cpp:q4_k, awq:g128 or vllm:tp2."
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Override a knob, such as stages.learn_gates.mask_lr=0.02."),
]


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name or a YAML file.")],
    model: Annotated[str, typer.Option(help="Hub id, local folder or config.json.")],
    keep: Keep = None,
    parameters: Parameters = None,
    speedup: Speedup = None,
    layout: Layout = "auto",
    max_steps: MaxSteps = None,
    sets: Set = None,
    engine: For = None,
    as_json: Json = False,
) -> None:
    """A dry run without weights: predicted shapes, counts, memory, tokens and time.

    Example: compresso plan compresso --model ./llama-7b/config.json --keep 0.7
    """
    from compresso.commands import plan_table as dryrun_report
    from compresso.runner import plan as dryrun

    raw = _raw(recipe, keep, parameters, speedup, layout, max_steps, sets, model, engine)
    dryrun_report.show(dryrun.plan(raw, model, layout, engine), as_json)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name or a YAML file.")],
    model: Annotated[str, typer.Option(help="Hub id or local folder of safetensors.")],
    output: Annotated[Path, typer.Option(help="Folder of the new checkpoint; must not exist or be empty.")],
    data: Annotated[
        str | None,
        typer.Option(help="Registered name or local file (.jsonl[.gz], .json, .parquet, .txt); several with commas."),
    ] = None,
    keep: Keep = None,
    parameters: Parameters = None,
    speedup: Speedup = None,
    layout: Layout = "auto",
    max_steps: MaxSteps = None,
    sets: Set = None,
    engine: For = None,
    seed: Annotated[int, typer.Option(help="Of every random draw.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run to the identical result.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing output; write a collapsed result.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave malformed data lines out, counted, instead of stopping.")
    ] = False,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream", help="Read weights from disk block by block: models larger than memory, one-shot recipes."
        ),
    ] = False,
    over_memory: Annotated[
        bool, typer.Option("--over-memory", help="Stream even if the estimate is above what is there.")
    ] = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not open the result in the engines of this machine.")
    ] = False,
    as_json: Json = False,
) -> None:
    """The job: prune, recover, write a checkpoint that loads, and record what was done.

    Example: compresso run compresso --model ./llama-7b --data alpaca-gpt4 --keep 0.7 --output ./llama-5b
    """
    from compresso.engines import verify as verifying
    from compresso.engines.parity import Parity
    from compresso.report.records import RunRecords
    from compresso.runner.run import run as run_job

    raw = _raw(recipe, keep, parameters, speedup, layout, max_steps, sets, model, engine)
    result = run_job(
        raw,
        model,
        data=data,
        output=output,
        layout=layout,
        seed=seed,
        device=device,
        resume=resume,
        force=force,
        skip_bad=skip_bad,
        stream=stream,
        over_memory=over_memory,
        verify=not no_verify,
    )
    if int(os.environ.get("RANK", "0")):
        return  # launched in several processes, of which one speaks
    if as_json:
        print(json.dumps(result.records, indent=2, allow_nan=False))
        return
    before, after = (result.records[when]["parameters"]["total"] for when in ("before", "after"))
    print(
        f"{output}: {before:,} -> {after:,} parameters, layout {result.records['layout']}. Open it with"
        f" compresso.load({str(output)!r})"
    )
    records = RunRecords.checked(result.records, "the run's records")
    if records.engines:
        verifying.show([Parity(**engine.model_dump()) for engine in records.engines], as_json=False)
    if dense := records.stored_dense():
        print(dense)


@app.command()
def measure(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Folders or hub ids, the dense one first.")],
    batch: Annotated[str | None, typer.Option(help="Batch sizes, such as 1,8; default 1,8, and 32 on a GPU.")] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Length of the prompts; default 256, or what a context holds.")
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(help="Tokens decoded after each; default 64, or what a context holds.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed rounds, in which the models take turns.")] = 5,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 for all; default: as the first is stored.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random prompts.")] = 0,
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Peak memory, in a process of its own for each model.")
    ] = True,
    output: Annotated[Path | None, typer.Option(help="A JSON file for the report.")] = None,
    as_json: Json = False,
) -> None:
    """Size, cost, memory, prefill and decode speed of models, side by side.

    Example: compresso measure ./llama-7b ./llama-5b --batch 1,8
    """
    from compresso.commands import measure as measuring
    from compresso.commands import measure_table as measuring_report

    report = measuring.measure(
        models,
        batches=None if batch is None else measuring.batch_sizes(batch),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
        memory=memory,
        device=device,
        dtype=dtype,
        seed=seed,
        output=output,
    )
    measuring_report.show(report, as_json)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id or local folder of safetensors.")],
    suite: Annotated[str | None, typer.Option(help="commonsense, reading, mmlu, bbh or world.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Single tasks, several with commas, such as piqa,boolq.")] = None,
    prompt: Annotated[
        str, typer.Option(help="Collaborative prompt: on, off or both; auto: on if pruned with it.")
    ] = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="Most items of each task, the first ones.")] = None,
    corpus: Annotated[
        str | None, typer.Option(help="Perplexity on wikitext2, c4 or a local file; without tasks, wikitext2.")
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help=(
                "sparsegpt (2048 tokens), llm-pruner (128), compresso (1024); default: the first that the context"
                " holds."
            )
        ),
    ] = None,
    data_root: Annotated[
        Path | None, typer.Option(help="Folder with local data files; else that of COMPRESSO_DATA, else the hub.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows a forward.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of examples that are drawn.")] = 0,
    output: Annotated[Path | None, typer.Option(help="File for the report of all numbers, as JSON.")] = None,
    as_json: Json = False,
) -> None:
    """What a model can do: perplexity, and benchmark tasks with their standard errors.

    Example: compresso evaluate ./llama-5b --suite commonsense --prompt both --output llama-5b.json
    """
    from compresso.commands import evaluate as evaluation

    report = evaluation.evaluate(
        model,
        suite=suite,
        tasks=None if tasks is None else [name for name in tasks.split(",") if name],
        corpus=corpus,
        protocol=protocol,
        prompt=prompt,
        limit=limit,
        data_root=data_root,
        batch_size=batch,
        device=device,
        seed=seed,
        output=output,
    )
    if as_json:
        print(report.model_dump_json(indent=2))
    else:
        evaluation.show(report)


@app.command()
def compare(
    results: Annotated[
        list[str], typer.Argument(metavar="DIR|FILE.json...", help="Folders of runs, files of evaluate and measure.")
    ],
    output: Annotated[
        Path, typer.Option(help="The page with tables, plots and texts; a report that lies there is replaced.")
    ] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """Several results side by side: a table here, and one self-contained HTML page.

    Example: compresso compare ./llama-small ./llama-uniform dense.json --output report.html
    """
    from compresso.commands import compare as comparison

    comparison.show(comparison.compare(results, output), as_json)
    if not as_json:
        print(f"report: {output}")


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id or local folder of safetensors.")],
    output: Annotated[Path, typer.Option(help="The file or folder to write.")],
    file_format: Annotated[
        str,
        typer.Option("--format", help="gguf, for llama.cpp; onnx; compressed-tensors, of rounded models; vllm-deci."),
    ],
    dtype: Annotated[
        str | None,
        typer.Option(
            help=(
                "Of gguf: f32, f16 (the default), bf16, q8_0, q4_0, q4_k_m and its like; of onnx: f32 (the default),"
                " int8."
            )
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    as_json: Json = False,
) -> None:
    """A checkpoint in the format of another engine, opened there if it is installed.

    Example: compresso export ./llama-5b --format gguf --output llama-5b.gguf --dtype q8_0
    """
    from compresso.commands import export as exporting

    told = exporting.export(model, output, format=file_format, dtype=dtype, force=force)
    if as_json:
        print(json.dumps(told, indent=2, allow_nan=False))
        return
    print(f"{output}: {told['bytes']:,} bytes, arch {told['arch']}, {told['dtype']}; {told['checked']}")


@app.command()
def verify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id or local folder of safetensors.")],
    as_json: Json = False,
) -> None:
    """In which engines a checkpoint opens and computes the same, and why not in the others.

    Example: compresso verify ./llama-5b
    """
    from compresso.engines import verify as verifying
    from compresso.engines.parity import OWN

    answers = verifying.verify(model)
    verifying.show(answers, as_json)
    if any(answer.engine == OWN and answer.opens != "yes" for answer in answers):
        raise typer.Exit(2)


def _raw(
    recipe: str,
    keep: float | None,
    parameters: str | None,
    speedup: float | None,
    layout: str,
    max_steps: int | None,
    sets: list[str] | None,
    model: str,
    engine: str | None,
) -> dict[str, Any]:
    """The recipe with the command line's overrides in it."""
    from compresso.runner.options import with_options

    return with_options(
        recipe,
        keep=keep,
        parameters=parameters,
        speedup=speedup,
        layout=layout,
        max_steps=max_steps,
        sets=sets or [],
        model=model,
        engine=engine,
    )


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point: run the command (of `sys.argv` if none is given), turn errors into one line, and exit."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        code = app(arguments or ["--help"], prog_name="compresso", standalone_mode=False)
        sys.stdout.flush()
        if code == 130:  # what typer makes of a KeyboardInterrupt
            print("interrupted", file=sys.stderr)
        sys.exit(code if isinstance(code, int) else 0)
    except Exception as error:
        message, code = _explained(error)
        if message:
            print(" ".join(message.split()), file=sys.stderr)
        sys.exit(code)
    except Interrupted as stop:
        cure = "; repeat the command with --resume to go on" if stop.saved else ""
        print(f"stopped by {stop.signal.name}{cure}", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM outside of training: end by an exception, so that half-written folders are removed on the way out."""
    raise Interrupted(signal.Signals(number), None)


def _explained(error: Exception) -> tuple[str, int]:
    """Message and exit code of a foreseen exception; others are raised again."""
    if isinstance(error, CompressoError):
        return f"{type(error).__name__}: {error}", error.exit_code
    if isinstance(error, TyperException):
        return f"usage: {error.format_message()} See `compresso --help`", 2
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return (
            f"ResourceError: out of memory ({error}); lower micro_batch, or set checkpointing: true or precision: bf16",
            3,
        )
    if isinstance(
        error, BrokenPipeError
    ):  # whoever read our output has left: nothing is wrong, and nothing more can be said to them
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return "", 0
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        return f"ResourceError: {error}; free some space, or choose another output", 3
    raise error
