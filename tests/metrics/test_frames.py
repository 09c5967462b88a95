"""Frames a second by a clock that is told what to say: warm-ups are not timed, models take turns, ratios are within
rounds.
"""

from collections.abc import Callable

import pytest
from transformers import ViTConfig, ViTForImageClassification

from compresso.errors import DataError
from compresso.metrics.frames import WARMUP, frame_measurements

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


def test_a_frame_counts_after_ten_that_warm_up_and_models_take_turns() -> None:
    models = {
        name: ViTForImageClassification(ViTConfig(**SIZES, image_size=16, patch_size=8)).train()
        for name in ("dense", "pruned")
    }
    called: list[str] = []
    for name, model in models.items():
        model.register_forward_hook(lambda *_, name=name: called.append(name))
    timed: list[list[str]] = []
    seconds = iter([1.0, 0.5, 2.0, 0.5, 4.0, 1.0])

    def clock(work: Callable[[], None]) -> float:
        before = len(called)
        work()
        timed.append(called[before:])
        return next(seconds)

    found = frame_measurements(models, rounds=3, frames=4, clock=clock)
    assert WARMUP >= 10 and called[: 2 * WARMUP] == ["dense"] * WARMUP + ["pruned"] * WARMUP
    assert timed == [["dense"] * 4, ["pruned"] * 4] * 3 and len(called) == 2 * WARMUP + 24
    (dense,), (pruned, faster) = found["dense"], found["pruned"]
    assert (dense.value, dense.low, dense.high, dense.unit) == (2.0, 1.0, 4.0, "frames/s")
    assert pruned.value == 8.0 and faster.value == 4.0 and faster.low == 2.0
    assert all(model.training for model in models.values())
    with pytest.raises(DataError, match="warmup=0: at least 1 wanted"):
        frame_measurements(models, warmup=0)
