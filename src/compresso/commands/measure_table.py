"""What `compresso measure` prints: one column a model, and in each row numbers of one kind, measured, counted or
estimated.
"""

import re
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from compresso.core.counted import counted
from compresso.metrics.record import Measurement, ModelResults, Report
from compresso.report.columns import CACHE, has_cache

_LABELS = {
    "parameters/total": "parameters",
    "parameters/blocks": "  of blocks",
    "parameters/embeddings": "  of embeddings",
    "parameters/norms": "  of norms",
    "bytes/disk": "weight files",
    "macs/token": "MACs a token",
    "macs/picture": "MACs a picture",
    "macs/patch": "MACs a patch",
    CACHE: "KV cache a token",
    "memory/peak": "peak memory",
    "prefill": "prefill tokens/s",
    "decode": "decode tokens/s",
    "prefill_speedup": "prefill speed-up",
    "decode_speedup": "decode speed-up",
    "decode_bound": "decode bound (bytes)",
    "cache_live": "tokens held in the cache",
    "cache_bytes": "cache, allocated",
}
"""What a row is called, in the order of the rows; of names that end in /batchB the part before."""


def show(report: Report, as_json: bool) -> None:
    """Print a report as JSON or as a table, with the words that belong to its numbers."""
    if as_json:
        print(report.model_dump_json(indent=2))
        return
    console = Console()
    models = report.models
    table = Table(
        title=_title(models),
        title_justify="left",
        caption="medians; below them lowest-highest",
        caption_justify="left",
    )
    for column in ("", "kind"):
        table.add_column(column, no_wrap=True)
    for number, results in enumerate(models):
        header = f"{results.name}\n(reference)" if number == 0 and len(models) > 1 else results.name
        table.add_column(header, justify="right", overflow="fold")
    for row in rows(models):
        table.add_row(*row)
    console.print(table)
    for line in remarks(models):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def rows(models: tuple[ModelResults, ...]) -> Iterator[list[str]]:
    """Label, kind of number, and one cell a model; kinds never share a row. Before the rows of a batch size stands one
    with its name.
    """
    held = [{(one.name, one.how): one for one in results.measurements} for results in models]
    keys = list(dict.fromkeys(key for of_one in held for key in of_one))
    if not has_cache(one for results in models for one in results.measurements):
        keys = [key for key in keys if key[0] != CACHE]
    shown = 0
    for name, how in sorted(keys, key=lambda key: _place(key[0])):
        stem, batch = _split(name)
        if batch != shown:
            yield [f"batch {batch}", "", *("" for _ in models)]
            shown = batch
        yield [_LABELS.get(stem, stem), how, *(_cell(of_one.get((name, how))) for of_one in held)]


def remarks(models: tuple[ModelResults, ...]) -> list[str]:
    """The sentences that a reader must see beside the numbers, each with its model and number."""
    return [
        f"{results.name}, {_label(one)}: {one.remark}"
        for results in models
        for one in results.measurements
        if one.remark
    ]


def _place(name: str) -> tuple[int, int]:
    """Rows of a batch size stand together, in the order of the labels; names without a label come last."""
    stem, batch = _split(name)
    places = list(_LABELS)
    return (batch, places.index(stem) if stem in places else len(places))


def _split(name: str) -> tuple[str, int]:
    """("decode", 8) of "decode/batch8"; batch 0 of names without one."""
    match = re.fullmatch(r"(.*)/batch(\d+)", name)
    return (match[1], int(match[2])) if match else (name, 0)


def _label(one: Measurement) -> str:
    """What a number is called in a sentence."""
    stem, batch = _split(one.name)
    return _LABELS.get(stem, stem).strip() + (f" at batch {batch}" if batch else "")


def _cell(one: Measurement | None) -> str:
    """A number with its extremes, and the first words of its remark if it says that there is no speed-up."""
    if one is None:
        return "-"
    text = _number(one.value, one.unit)
    if one.low is not None and one.high is not None and one.n != 1:
        text += f"\n{_number(one.low, one.unit)}-{_number(one.high, one.unit)}"
    return f"{text}\nno speed-up" if one.remark and one.remark.startswith("no speed-up") else text


def _number(value: float, unit: str) -> str:
    if unit == "share":
        return f"{100 * value:.1f} %"
    if unit == "1":
        return f"{value:.2f}"
    if unit == "tokens/s":
        return f"{value / 1000:,.1f}k" if value >= 10_000 else f"{value:,.0f}" if value >= 10 else f"{value:.3g}"
    if unit == "bytes" and value >= 10_000:
        return f"{value / 1e9:,.2f} GB" if value >= 1e9 else f"{value / 1e6:,.2f} MB"
    return f"{value:,.0f}"


def _title(models: tuple[ModelResults, ...]) -> str:
    """Where and how all this was measured, of the first timed number, else of the first number."""
    every = [one for results in models for one in results.measurements]
    timed = next((one for one in every if one.unit == "tokens/s"), None)
    environment = (timed or every[0]).environment
    threads = f", {counted(environment.threads, 'thread')}" if environment.device == "cpu" else ""
    text = f"{environment.hardware} ({environment.device}{threads})" + (
        f", {environment.dtype}" if environment.dtype else ""
    )
    if timed is None:
        return text
    facts = timed.protocol
    order = "interleaved " if facts.get("interleaved") else ""
    return (
        f"{text}\nprompts of {facts['prompt_tokens']} tokens, {facts['new_tokens']} new ones, {facts['rounds']}"
        f" {order}rounds"
    )
