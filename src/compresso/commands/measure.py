"""`compresso measure`: size, cost, speed and memory of models side by side, the first being the dense one.

All models are found, checked and fitted into memory before the first is read. Peak memory comes first, in processes of
their own, while this one holds no weights; then all models are loaded together, so that they can be timed in turn.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from compresso.checkpoint.load import load_model, numbers_of
from compresso.checkpoint.scratch import check_scratch
from compresso.checkpoint.source import Source, open_source
from compresso.checkpoint.writes_text import refuse_textless
from compresso.commands.measure_table import show
from compresso.door import public
from compresso.errors import CheckpointError, DataError, ResourceError, nearest
from compresso.metrics.forward import context_of
from compresso.metrics.latency import speed_measurements
from compresso.metrics.memory import peak_memory
from compresso.metrics.pruned_context import check_cache, check_rule, has_gates, hold_context_, left_out
from compresso.metrics.record import Environment, Measurement, ModelResults, Report
from compresso.metrics.report_file import report_path, write_report_file
from compresso.metrics.size import size_measurements
from compresso.metrics.timed_generation import lengths
from compresso.runner.output import stored_dtype
from compresso.training.device import choose_device
from compresso.training.progress import PATIENCE, Progress

__all__ = ["batch_sizes", "measure", "show"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BATCHES, BATCHES_ON_GPU = (1, 8), (1, 8, 32)
WARMUP = 1

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A measurement that nothing speaks against.

    Args:
        sources: name in tables -> checked model, the dense one first.
        device, dtype: of all models.
        batches, prompt_tokens, new_tokens, rounds: what is timed.
        caches: name -> the rule by which that one's cache forgets.
        whole: name of one with such a cache -> name of the same model without, whose weights it shares.
    """

    sources: Mapping[str, Source]
    device: torch.device
    dtype: torch.dtype
    batches: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    rounds: int
    caches: Mapping[str, str]
    whole: Mapping[str, str]


@public
def measure(
    models: Sequence[str | Path],
    *,
    batches: Sequence[int] | None = None,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    rounds: int = 5,
    memory: bool = True,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    output: Path | str | None = None,
    quiet: bool = False,
    cache: str | None = None,
) -> Report:
    """Size, multiply-accumulates, peak memory, prefill and decode speed of models, the first being the dense reference.

    Args:
        models: folders, GGUF files or hub ids.
        batches: batch sizes; None for 1 and 8, and 32 on a GPU. Peak memory is measured at the first.
        prompt_tokens, new_tokens: of each sequence; None for 256 and 64, or fewer where a model's context holds no
            more.
        rounds: timed ones, after one that is not.
        memory: whether to measure peak memory, which takes a process a model.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: "float32", "bfloat16" or "float16" for all models; None for the one the first is stored in.
        seed: of the random prompts.
        output: a file to write the report to, as JSON; a report that lies there is replaced.
        quiet: show no progress.
        cache: a rule by which the cache forgets, as `compresso.load` takes it, such as "keydiff:0.5": each model is
            measured once more with it. One with learned gates is measured with its own cache, once.

    Returns:
        The results of each model, in the order given, each followed by itself with the cache that was asked for.

    Raises:
        CompressoError: a model that is missing or unsafe, or settings that cannot be, before anything is timed or
            written; ResourceError if the models do not fit into memory together.
    """
    plan = _planned(models, batches, prompt_tokens, new_tokens, rounds, device, dtype, cache)
    target = None if output is None else report_path(output, [source.folder for source in plan.sources.values()])
    if memory:
        check_scratch()
    turns = len(plan.sources) * len(plan.batches) * (rounds + WARMUP)
    with progress(len(plan.sources) * (1 + memory) + turns, quiet) as advance:
        found: dict[str, list[Measurement]] = {name: [] for name in plan.sources}
        sizes = {"batch": plan.batches[0], "prompt_tokens": plan.prompt_tokens, "new_tokens": plan.new_tokens}
        for name, source in plan.sources.items() if memory else ():
            advance(f"{name}, peak memory")
            assert source.folder is not None  # checked: it has weights
            where = {"device": plan.device, "dtype": plan.dtype, "cache": plan.caches.get(name)}
            found[name].append(peak_memory(source.folder, **sizes, **where, seed=seed))
        live: dict[str, PreTrainedModel] = {}
        for name, source in plan.sources.items():
            advance(f"{name}, loading")
            whole = plan.whole.get(name)
            live[name] = load_model(source, plan.dtype, plan.device) if whole is None else _sharing(live[whole])
            found[name] += size_measurements(live[name], source.folder, Environment.here(plan.device))
        for sentence in dict.fromkeys(one for source in plan.sources.values() for one in left_out(source)):
            log.warning("%s", sentence)
        for name, source in plan.sources.items():  # now that all are copied
            hold_context_(live[name], source, plan.caches.get(name))
        speeds = speed_measurements(
            live,
            plan.batches,
            plan.prompt_tokens,
            plan.new_tokens,
            plan.rounds,
            warmup=WARMUP,
            seed=seed,
            advance=advance,
            caches=plan.caches,
        )
    results = tuple(
        ModelResults(
            name=name,
            model=source.identity.name,
            fingerprint=source.identity.fingerprint,
            measurements=(*found[name], *speeds[name]),
        )
        for name, source in plan.sources.items()
    )
    report = Report(created=datetime.now(UTC).isoformat(timespec="seconds"), models=results)
    if target is not None:
        write_report_file(target, report)
    return report


def batch_sizes(text: str) -> tuple[int, ...]:
    """The batch sizes in "1,8". Raises DataError if they are not whole numbers."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise DataError(f"--batch '{text}' is not a list of whole numbers; wanted something like 1,8") from None


def _planned(
    models: Sequence[str | Path],
    batches: Sequence[int] | None,
    prompt_tokens: int | None,
    new_tokens: int | None,
    rounds: int,
    device: str | torch.device,
    dtype: str | torch.dtype | None,
    cache: str | None,
) -> Plan:
    """Check everything that can be checked without reading weights."""
    if not models:
        raise DataError("no model to measure; give at least one, the dense one first")
    if rounds < 1 or (batches is not None and (not batches or min(batches) < 1)):
        listed = ",".join(map(str, batches or ())) or "of the defaults"
        raise DataError(f"--rounds {rounds}, --batch {listed}: all must be at least 1, such as 5 rounds of 1,8")
    if cache is not None:
        check_rule(cache)
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise DataError(f"--dtype '{dtype}' is unknown; {nearest(dtype, DTYPES)}")
    where = choose_device(device)
    sources: dict[str, Source] = {}
    caches: dict[str, str] = {}
    whole: dict[str, str] = {}
    for model in models:
        source = open_source(model, packed=True)
        if not source.tensors:
            raise CheckpointError(
                f"{model} has no weights to measure; give a folder of safetensors, GGUF file or hub id"
            )
        refuse_textless(source, "prefill and decoding are timed of causal language models")
        same = sum(1 for name in sources if name == source.name or name.startswith(f"{source.name} ("))
        name = f"{source.name} ({same + 1})" if same else source.name
        sources[name] = source
        if cache is not None and (len(models) == 1 or not has_gates(source)):
            check_cache(source, cache)
            beside = f"{name}, {cache}"
            sources[beside], caches[beside], whole[beside] = source, cache, name
    if cache is not None and not caches:
        raise DataError(f"--cache {cache!r}: learned gates decide what every model's cache holds; leave --cache out")
    contexts = {name: context_of(source.config) for name, source in sources.items()}
    prompt, new = lengths(contexts, prompt_tokens, new_tokens)
    chosen = DTYPES[dtype] if isinstance(dtype, str) else dtype or stored_dtype(next(iter(sources.values())))
    sizes = tuple(dict.fromkeys(batches or (BATCHES_ON_GPU if where.type == "cuda" else BATCHES)))
    plan = Plan(sources, where, chosen, sizes, prompt, new, rounds, caches, whole)
    _check_fit(plan)
    return plan


def _check_fit(plan: Plan) -> None:
    """Raise ResourceError if the weights of all models do not fit into the device's free memory together."""
    each = {
        name: numbers_of(source) * plan.dtype.itemsize
        for name, source in plan.sources.items()
        if name not in plan.whole
    }
    host = psutil.virtual_memory().available
    cure = "measure fewer models at a time, give --dtype bfloat16, or free memory"
    for needed, free, what in (
        (
            sum(each.values()),
            torch.cuda.mem_get_info(plan.device)[0] if plan.device.type == "cuda" else host,
            f"on {plan.device}",
        ),
        (max(each.values()), host, "of the host, through which weights are read"),
    ):
        if needed > free:
            raise ResourceError(
                f"the weights of {', '.join(each)} in {_short(plan.dtype)} need {needed / 1e9:.1f} GB {what}, of which"
                f" {free / 1e9:.1f} GB are free; {cure}"
            )


def _sharing(model: PreTrainedModel) -> PreTrainedModel:
    """The model once more, of the same tensors, so that another cache can be put on it."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def progress(total: int, quiet: bool) -> Iterator[Callable[[str], None]]:
    """The display of so many pieces of work; what it gives is called before each of them."""
    shown, begun = Progress("silent" if quiet else "auto"), iter(range(total))
    with shown.running(total, 0, "measuring", PATIENCE):
        yield lambda what: shown.step(next(begun), f"measuring {what}", {}, 0)
