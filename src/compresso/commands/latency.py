"""`compresso latency`: what each module of a model takes on this machine, as a table that budgets are counted by."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import torch

from compresso.arch.base import Arch, LayerShape, arch_for
from compresso.arch.costs import shape_facts
from compresso.checkpoint.atomic import write_text
from compresso.checkpoint.kinds import of_pictures
from compresso.checkpoint.load import meta_model
from compresso.checkpoint.scratch import scratch_folder
from compresso.checkpoint.source import Source, open_source
from compresso.checkpoint.tokenizer import has_tokenizer, load_tokenizer
from compresso.checkpoint.writes_text import refuse_textless
from compresso.commands.latency_fit import fit_times, shapes_to_fit
from compresso.commands.latency_table import show
from compresso.commands.measure import DTYPES, progress
from compresso.core.latency_table import Conditions, LatencyTable, Phase
from compresso.core.picture_table import PictureTable
from compresso.door import public
from compresso.engines.file_times import TIMERS, timer_of
from compresso.errors import ArchError, CheckpointError, DataError, nearest
from compresso.metrics.module_latency import latin, time_modules
from compresso.metrics.record import Environment
from compresso.metrics.shaped import ShapedModels
from compresso.runner.measured_budget import machine_here, read_table
from compresso.runner.output import stored_dtype
from compresso.runner.picture_latency import picture_table
from compresso.training.device import choose_device

__all__ = ["latency", "show"]

ENGINES = ("torch", *TIMERS)
CONTEXT, LEVELS, ROUNDS = 512, 6, 9


@public
def latency(
    model: str | Path,
    *,
    engine: str = "torch",
    batch: int = 1,
    context: int = CONTEXT,
    phase: str = "decode",
    dtype: str | None = None,
    levels: int = LEVELS,
    rounds: int = ROUNDS,
    device: str = "auto",
    output: Path | str | None = None,
    quiet: bool = False,
) -> LatencyTable | PictureTable:
    """Time what each kind of module of a model takes with fewer and fewer units, on this machine; of a model of
    pictures whole networks, one picture at a time, and their peak memory.

    torch is timed module by module inside whole models, onnxruntime and llama.cpp by a fit to the times of whole files
    of different shapes. All of them have the model's shapes or fewer units, and weights of no meaning.

    Args:
        model: folder, GGUF file, hub id or config.json; its shapes are enough, but llama.cpp needs a tokenizer, too.
        engine: "torch", "onnxruntime" or "llama.cpp".
        batch: sequences at a time.
        context: tokens of each: those before a decoded one, or those of a prefill.
        phase: "decode" (one token at the context) or "prefill" (the context).
        dtype: of the weights: "float32", "bfloat16" or "float16" for torch, "f32" or "int8" for onnxruntime, "f32",
            "f16", "bf16", "q8_0" or "q4_0" for llama.cpp; None for float32 on a CPU and the stored type on a GPU.
        levels: numbers of channels that are timed, evenly spaced, and at most so many of key/value heads; torch only.
        rounds: turns of each model that count.
        device: "auto", "cpu", "cuda" or "cuda:N"; of torch.
        output: a file to write the table to, as JSON; a table that lies there is replaced.
        quiet: show no progress.

    Returns:
        The table.

    Raises:
        CompressoError: a model that is missing or has nothing to time, settings that cannot be, or an engine that is
            not here, before anything is timed or written.
    """
    for name, number in (("--batch", batch), ("--context", context), ("--rounds", rounds), ("--levels", levels)):
        if number < 1:
            raise DataError(f"{name} {number}: wanted at least 1")
    for name, value, known in (("--engine", engine, ENGINES), ("--phase", phase, ("decode", "prefill"))):
        if value not in known:
            raise DataError(f"{name} '{value}' is unknown; {nearest(value, known)}")
    target = None if output is None else _table_path(output)
    source = open_source(model, weights=False)
    where = choose_device(device) if engine == "torch" else torch.device("cpu")
    if of_pictures(source.config):
        _refuse_of_tokens(source, ("--batch", batch, 1), ("--context", context, CONTEXT), ("--phase", phase, "decode"))
        pictured = _pictured(source, engine, levels, rounds, dtype, where, quiet)
        if target is not None:
            write_text(target, pictured.to_json())
        return pictured
    shaped = meta_model(source)
    _check_reads(source, shaped.main_input_name, engine, phase)
    arch = arch_for(shaped.config)
    shapes = _one_kind(arch, arch.shapes(shaped), source)
    facts = shape_facts(arch, shaped)
    asked: Phase = "decode" if phase == "decode" else "prefill"
    conditions = Conditions(engine, asked, batch, context, _dtype(engine, dtype, source, where))
    if engine == "torch":
        table = _in_place(source, shapes, conditions, levels, rounds, where, quiet)
    else:
        table = _fitted(source, shapes, conditions, rounds, quiet)
    table = replace(table, model=facts)
    if target is not None:
        write_text(target, table.to_json())
    return table


def _refuse_of_tokens(source: Source, *options: tuple[str, object, object]) -> None:
    """Raise ArchError for options of token models, each with its value and its default, that were set for pictures."""
    for name, value, usual in options:
        if value != usual:
            raise ArchError(
                f"{name} {value}: {source.name} sees pictures, of which whole networks are timed, one at a time; leave"
                f" {name} out"
            )


def _pictured(
    source: Source, engine: str, levels: int, rounds: int, dtype: str | None, device: torch.device, quiet: bool
) -> PictureTable:
    """The table of a model of pictures. Raises ArchError for another engine."""
    if engine != "torch":
        raise ArchError(
            f"--engine {engine} times language models, and {source.name} sees pictures; give --engine torch"
        )
    kind = DTYPES[_dtype(engine, dtype, source, device)]
    with progress(levels + 1, quiet) as advance:
        return picture_table(source, levels, rounds, kind, device, advance)


def _in_place(
    source: Source,
    shapes: Sequence[LayerShape],
    conditions: Conditions,
    levels: int,
    rounds: int,
    device: torch.device,
    quiet: bool,
) -> LatencyTable:
    """A table of torch, without the model's facts."""
    make = ShapedModels(source, DTYPES[conditions.dtype], device)
    heads = spaced(max(shape.kv_heads for shape in shapes), levels)
    channels = spaced(max(shape.channels for shape in shapes), levels)
    models = len(latin(heads, channels, len(shapes)))
    with progress(models * (rounds + 1), quiet) as advance:
        found = time_modules(make, (heads, channels), len(shapes), conditions, rounds, advance=advance)
    here = Environment.here(device)
    return LatencyTable(
        {},
        machine_here(str(device)),
        conditions,
        found.fixed,
        {**found.attention, **({} if 0 in found.attention else {0: 0.0})},
        {**found.ffn, **({} if 0 in found.ffn else {0: 0.0})},
        "in place",
        found.measured,
        versions=here.versions,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _fitted(
    source: Source, shapes: Sequence[LayerShape], conditions: Conditions, rounds: int, quiet: bool
) -> LatencyTable:
    """A table of an engine that times whole files, without the model's facts."""
    timer = timer_of(conditions.engine)
    tokenizer = load_tokenizer(source) if has_tokenizer(source) else None
    heads, channels = max(shape.kv_heads for shape in shapes), max(shape.channels for shape in shapes)
    models = shapes_to_fit(heads, channels, len(shapes), timer.step)
    make = ShapedModels(source, torch.float32, torch.device("cpu"))
    threads = torch.get_num_threads()
    with scratch_folder() as scratch, progress(len(models) + 1, quiet) as advance:
        paths: list[Path] = []
        for number, widths in enumerate(models, start=1):
            advance(f"writing file {number} of {len(models)}")
            paths.append(scratch / f"{number}{timer.suffix}")
            timer.write(make.model(widths), tokenizer, paths[-1], conditions.dtype)
        advance(f"timing {len(models)} files in {conditions.engine}")
        times = timer.times(paths, conditions, rounds, threads, int(source.config.vocab_size))
    fitted = fit_times(models, [median(one) for one in times])
    here = Environment.here(onnxruntime="onnxruntime") if conditions.engine == "onnxruntime" else Environment.here()
    return LatencyTable(
        {},
        machine_here(),
        conditions,
        fitted.terms[0],
        fitted.curve(0, heads),
        fitted.curve(1, channels),
        "fitted",
        sum(map(len, times)),
        round(fitted.error, 4),
        here.versions,
        datetime.now(UTC).isoformat(timespec="seconds"),
    )


def spaced(units: int, levels: int) -> list[int]:
    """None, and at most `levels` numbers of units up to all of them, evenly spaced.

    >>> spaced(3, 6), spaced(1536, 4)
    ([0, 1, 2, 3], [0, 384, 768, 1152, 1536])
    """
    return sorted({round(units * part / levels) for part in range(levels + 1)})


def _check_reads(source: Source, given: str, engine: str, phase: str) -> None:
    """Raise ArchError for a model of which no such forward can be timed. given: the name of what it reads."""
    if given != "input_ids":
        refuse_textless(source, "forwards over tokens are timed, and it reads none")
    if engine != "torch":
        refuse_textless(source, f"--engine {engine} times causal language models; give --engine torch --phase prefill")
    if phase == "decode":
        refuse_textless(source, "it decodes nothing: give --phase prefill")


def _one_kind(arch: Arch, shapes: Sequence[LayerShape], source: Source) -> Sequence[LayerShape]:
    """The shapes, if one curve a kind can describe their modules. Raises ArchError if none can."""
    groups = {shape.query_heads // shape.kv_heads for shape in shapes if shape.kv_heads}
    if len(groups) != 1 or not any(shape.channels for shape in shapes):
        raise ArchError(
            f"{source.name}: its layers have {sorted(groups)} query heads for each key/value head, and modules of one"
            " kind are timed; give a model whose layers are alike"
        )
    return shapes


def _dtype(engine: str, dtype: str | None, source: Source, device: torch.device) -> str:
    """The type of the weights, as the engine names it. Raises DataError for one that it does not know."""
    known = tuple(DTYPES) if engine == "torch" else TIMERS[engine].dtypes
    if dtype is not None:
        if dtype not in known:
            raise DataError(f"--dtype '{dtype}' is unknown to {engine}; {nearest(dtype, known)}")
        return dtype
    if engine != "torch" or device.type == "cpu" or not source.tensors:
        return known[0]
    return str(stored_dtype(source)).removeprefix("torch.")


def _table_path(output: str | Path) -> Path:
    """Where the table goes. Raises CheckpointError for a place that cannot be written to, or a file that is none."""
    path = Path(output).expanduser()
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise CheckpointError(f"output {path} is no file that can be written; give one such as latency.json")
    if path.exists():
        try:
            read_table(path)
        except Exception as error:
            raise CheckpointError(f"output {path} exists and is no latency table; choose another output") from error
    return path
