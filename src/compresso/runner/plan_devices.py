"""What a plan says of devices that are not here, one or several: what each holds and does, and what was assumed.

Several devices have a process each, as `torchrun --nproc-per-node N` starts them. Each holds the whole model (DDP), and
calibration and training are shared out; candidates of searches, comparisons, and gradients of weights on calibration
rows are computed by each, so that their time stays.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from compresso.runner.devices import REACHED, Planned
from compresso.runner.dry_run import Acted

SHARED_OUT = ("calibration", "training", "teacher")
"""Kinds of passes of which each process makes its share."""


def flops_of_each(acted: Acted, rows: Sequence[Mapping[str, Any]], count: int) -> float | None:
    """What the device that does most of a stage computes; None where the length of the data decides.

    Args:
        acted: the stage.
        rows: a plan's row of each of its passes.
        count: devices.
    """
    if any(row["flops_at_most"] is None for row in rows):
        return None
    shares = [_share(passed.what, passed.weights, count) for passed in acted.passes]
    return sum(row["flops_at_most"] * share for row, share in zip(rows, shares, strict=True))


def _share(what: str, weights: bool, count: int) -> float:
    """Of a kind of passes, what each device makes; `weights`: whether gradients of weights are taken."""
    if what == "calibration" and weights:
        return 1.0
    return 1 / count if what in SHARED_OUT else 1.0


def room(where: Planned, stages: Iterable[Mapping[str, Any]], acted: Sequence[Acted]) -> list[str]:
    """What was assumed of devices that are not here, and whether each stage fits one of them.

    Args:
        where: the devices.
        stages: rows of a plan that say what a stage holds.
        acted: the stages.
    """
    assert where.known is not None
    told = [
        f"time on {where.name}: {REACHED:.0%} of {where.known.flops / 1e12:.0f} dense 16-bit TFLOP/s, by its data sheet"
    ]
    if where.count > 1:
        told.append(
            f"{where.count} processes, a device each: every one holds the whole model, calibration and training are"
            " shared out, searches and comparisons are not; sending and waiting are not counted, and the last"
            " evaluation is one process's"
        )
    offloaded = {one.name: one.offloaded for one in acted if one.offloaded is not None}
    for one in stages:
        memory = one["memory_bytes_estimated"]
        needed = memory["total"] if isinstance(memory, dict) else memory
        verdict = "fits" if needed < where.known.memory else "DOES NOT FIT"
        each = f" each of {where.count}" if where.count > 1 else ""
        told.append(f"{one['stage']}: about {needed / 1e9:.1f} GB{each} {verdict} {where.known.memory / 1e9:.0f} GB")
        if needed >= where.known.memory:
            told += _cures(where, one, memory, offloaded)
    return told


def _cures(where: Planned, one: Mapping[str, Any], memory: Any, offloaded: Mapping[str, int]) -> list[str]:
    """What would fit instead of a stage that does not."""
    assert where.known is not None
    if one["stage"] in offloaded:
        needed = offloaded[one["stage"]]
        verdict = "fits" if needed < where.known.memory else "does not fit either"
        return [
            f"{one['stage']}: with --offload about {needed / 1e9:.1f} GB, which {verdict}; the time of reading weights"
            " is not counted"
        ]
    if isinstance(memory, dict) and where.count > 1:
        whole = memory["weights"] + memory["trained"]
        needed = whole / where.count + memory["activations"]
        verdict = "would fit" if needed < where.known.memory else "would not fit either"
        return [
            f"{one['stage']}: sharded over {where.count} (FSDP 2) weights and training state take about"
            f" {needed / 1e9:.1f} GB, which {verdict}; compresso.fit trains so, and a run refuses it"
        ]
    return []
