"""What a person reads when a run has ended: five lines, each with the dense model's number and the result's."""

from collections import Counter
from pathlib import Path

from compresso.metrics.record import Measurement, ModelResults
from compresso.report.columns import title, written
from compresso.report.records import RunRecords
from compresso.report.trust_rows import fallen
from compresso.tasks.base import task_named

_HOW = {"estimated": "predicted", "measured": "measured", "counted": "counted"}


def summary(records: RunRecords, folder: Path) -> list[str]:
    """Parameters, bytes, quality on held-out examples, decoding speed with its bound (of pictures frames a second, and
    memory), time where it was budgeted, and where everything lies.

    Args:
        records: of the run.
        folder: the checkpoint, as the run was told.
    """
    dense, pruned = records.report.models[0], records.report.models[-1]
    rows = [
        ("parameters", _counted(records)),
        ("bytes", _bytes(records, dense, pruned)),
        _quality(records, dense, pruned),
        *_speeds(records, dense, pruned),
        *([("time", words)] if (words := _time(dense, pruned)) else []),
        *([("trust", words)] if (words := _trust(pruned)) else []),
        (
            "written",
            f"{folder}, layout {records.layout}: report.html, README.md (card); compresso.load({str(folder)!r})",
        ),
    ]
    width = max(len(name) for name, _ in rows)
    return [f"{name:{width}}  {words}" for name, words in rows]


def _counted(records: RunRecords) -> str:
    before, after = records.before.parameters["total"], records.after.parameters["total"]
    return f"{before:,} -> {after:,} ({100 * after / before:.1f} %)"


def _bytes(records: RunRecords, dense: ModelResults, pruned: ModelResults) -> str:
    before, after = _found(dense, "bytes/disk"), _found(pruned, "bytes/disk")
    words = "not counted"
    if before is not None and after is not None:
        share = f"({100 * after.value / before.value:.1f} %)"
        words = f"{written(before.value, 'bytes')} -> {written(after.value, 'bytes')} {share}"
    return "; ".join(part for part in (words, records.stored_dense()) if part)


def _quality(records: RunRecords, dense: ModelResults, pruned: ModelResults) -> tuple[str, str]:
    name = task_named(records.recipe.task).metric
    label = f"{title(name)} {name.rpartition('/')[2]}".lower()
    old, new = _found(dense, name), _found(pruned, name)
    if new is None:
        return label, f"not measured: {pruned.not_measured.get(name, 'no data')}; guard: {records.guard.verdict}"
    shown = written(new.value, new.unit, name, new.stderr)
    examples = new.protocol.get("examples", new.n)
    before = "not measured" if old is None else written(old.value, old.unit, name, old.stderr)
    held = f"{examples} held-out example{'' if examples == 1 else 's'}"
    return label, f"{before} -> {shown}, on {held}; guard: {records.guard.verdict}"


def _speeds(records: RunRecords, dense: ModelResults, pruned: ModelResults) -> list[tuple[str, str]]:
    """Of models of texts how fast they decode; of models of pictures frames, and the memory that one takes."""
    if task_named(records.recipe.task).reads_text:
        return [("decoding", _speed(dense, pruned))]
    return [("frames", _frames(dense, pruned)), ("memory", _memory(dense, pruned))]


def _frames(dense: ModelResults, pruned: ModelResults) -> str:
    old, new, ratio = _found(dense, "frames"), _found(pruned, "frames"), _found(pruned, "frames_speedup")
    if old is None or new is None or ratio is None:
        return f"not measured: {pruned.not_measured.get('frames', 'no picture was read')}"
    rounds = "" if ratio.low is None or ratio.high is None else f" ({ratio.low:.2f} to {ratio.high:.2f} over rounds)"
    return f"{old.value:,.1f} -> {new.value:,.1f} frames/s, {ratio.value:.2f} x{rounds}"


def _memory(dense: ModelResults, pruned: ModelResults) -> str:
    old, new = _found(dense, "memory/peak"), _found(pruned, "memory/peak")
    if old is None or new is None:
        return f"not measured: {(pruned.not_measured | dense.not_measured).get('memory', 'no picture was read')}"
    return f"{written(old.value, 'bytes')} -> {written(new.value, 'bytes')} of a process that reads one picture"


def _speed(dense: ModelResults, pruned: ModelResults) -> str:
    old, new = _found(dense, "decode/batch1"), _found(pruned, "decode/batch1")
    ratio, bound = _found(pruned, "decode_speedup/batch1"), _found(pruned, "decode_bound/batch1")
    if old is None or new is None or ratio is None or bound is None:
        return f"not measured: {pruned.not_measured.get('speed', 'the task decodes nothing')}"
    remark = "" if ratio.remark is None else f"; {ratio.remark}"
    return (
        f"{old.value:,.1f} -> {new.value:,.1f} tokens/s, {ratio.value:.2f} x (bytes allow {bound.value:.2f} x){remark}"
    )


def _time(dense: ModelResults, pruned: ModelResults) -> str:
    """What a forward was predicted and measured to take, of a run with a budget of time; "" of others."""
    told: list[str] = []
    for model in (dense, pruned):
        numbers = [one for one in model.measurements if one.name.startswith(("prefill_ms/", "decode_ms/"))]
        if not numbers:
            return ""
        told.append(", ".join(f"{written(one.value, one.unit)} {_HOW[one.how]}" for one in numbers))
    lacking = pruned.not_measured.get("time")
    return " -> ".join(told) + (f"; not measured: {lacking}" if lacking else "")


def _trust(pruned: ModelResults) -> str:
    """What fell, and how many dimensions were compared; "" of a run that did not ask."""
    if not pruned.changes:
        return f"not measured: {pruned.not_measured['trust']}" if "trust" in pruned.not_measured else ""
    counts = Counter(one.verdict for one in pruned.changes)
    told = ", ".join(f"{verdict}: {n}" for verdict, n in counts.items())
    names = fallen(pruned)
    return f"{told}" + (f"; fell beyond noise: {', '.join(names)}" if names else "")


def _found(model: ModelResults, name: str) -> Measurement | None:
    return next((one for one in model.measurements if one.name == name), None)
