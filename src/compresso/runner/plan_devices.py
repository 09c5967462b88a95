"""What a plan says of devices that are not here, one or several: what each holds and does, and what was assumed.

Several devices have a process each, as `torchrun --nproc-per-node N` starts them. Each holds the whole model (DDP), and
calibration and training are shared out; candidates of searches, comparisons, and gradients of weights on calibration
rows are computed by each, so that their time stays. Launched with FSDP 2, some stages spread the model while they
train.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from compresso.runner.acted import Acted
from compresso.runner.devices import REACHED, Planned

TRAINED_BYTES = 16
"""Of a trained parameter with its gradient and AdamW's two moments, float32."""
GRADIENT_BYTES = 4
"""Of a trained parameter's gradient once more, where DDP sends it to other processes."""
GATHERED = 2
"""Blocks that are whole at a time under FSDP 2: the one that runs, and the next."""
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


def spread_bytes(
    one: Acted, dense: Mapping[str, int], width: int, activations: int, count: int
) -> dict[str, int] | None:
    """What each of several devices holds under FSDP 2, at its largest, in bytes: "training", "around" it, and the more
    of both as "total"; None for one device, and where the stage does not spread.

    Training: shares of all weights, gradients and moments; whole are two blocks of each model, what is outside of
    blocks, gradients of as much, and what learns beside the model. Around: the whole model, in float32 where its
    weights learn, a live teacher, and the slices that the whole is gathered from. Another model that teaches is whole.

    Args:
        one: the stage.
        dense: parameters of the dense model, as "total" and "blocks".
        width: bytes of a number.
        activations: bytes.
        count: devices.
    """
    learning = one.learning
    if learning is None or not learning.spreads or count == 1:
        return None
    of_all = "all" in one.trainable
    of_model, beside = 4 if learning.lora is None else width, one.trainable.get("gates", 0)
    inside = sum(one.trainable.values()) - beside
    blocks = max(int(getattr(one.config, "num_hidden_layers", 1)), 1)
    at_once = one.parameters - one.in_blocks + GATHERED * one.in_blocks // blocks
    teacher = learning.parameters_of_teacher(dense["total"]) if learning.cached is None else 0
    spread = dense["blocks"] if teacher and learning.other is None else 0
    taught = teacher - spread + GATHERED * spread // blocks
    of_teacher = spread * width
    slices = (0 if of_all else one.parameters * of_model) + inside * TRAINED_BYTES + of_teacher
    training = (
        -(-slices // count)
        + at_once * (of_model + GRADIENT_BYTES * of_all)
        + taught * width
        + beside * TRAINED_BYTES
        + activations
    )
    around = one.parameters * of_model + teacher * width + -(-(one.parameters * of_model + of_teacher) // count)
    return {"training": training, "around": around, "total": max(training, around)}


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
    spread: Mapping[str, int] | None = one.get("memory_bytes_spread")
    if spread is not None:
        verdict = "fits" if spread["total"] < where.known.memory else "DOES NOT FIT either"
        return [
            f"{one['stage']}: launched with FSDP 2 (accelerate launch --use_fsdp --fsdp_version 2) about"
            f" {spread['training'] / 1e9:.1f} GB each while it trains, and {spread['around'] / 1e9:.1f} GB before and"
            f" after, where each holds the whole model, which {verdict}"
        ]
    return []
