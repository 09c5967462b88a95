"""Speeds and speed-ups from seconds that the test makes up: the arithmetic is tested, never the time."""

import copy
from collections.abc import Callable
from statistics import median

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from compresso.errors import DataError
from compresso.metrics.latency import speed_measurements
from compresso.metrics.record import Measurement
from tests.arch.conftest import MOE
from tests.metrics.tiny import tiny


def scripted(seconds: list[float]) -> Callable[[Callable[[], None]], float]:
    """A clock that says these seconds, in turn, whatever the work."""
    left = iter(seconds)

    def clock(work: Callable[[], None]) -> float:
        work()
        return next(left)

    return clock


def by_name(found: tuple[Measurement, ...]) -> dict[str, Measurement]:
    named = {one.name: one for one in found}
    assert len(named) == len(found)
    return named


def test_rates_speed_ups_and_spread_of_a_made_up_clock() -> None:
    models = {"dense": tiny(), "pruned": tiny(channels=8)}
    # each turn takes a prefill and a decode; the first two turns are the warm-up, of which nothing may be seen
    rounds = [(1000.0, 1000.0, 1000.0, 1000.0), (4.0, 8.0, 2.0, 5.0), (8.0, 6.0, 4.0, 4.0), (2.0, 6.0, 1.0, 3.0)]
    turns: list[str] = []
    clock = scripted([second for one in rounds for second in one])
    found = speed_measurements(models, (2,), prompt_tokens=8, new_tokens=3, rounds=3, clock=clock, advance=turns.append)
    assert [line.split(",")[0] for line in turns] == ["dense", "pruned"] * 4
    assert sum("warm-up" in line for line in turns) == 2
    dense, pruned = by_name(found["dense"]), by_name(found["pruned"])
    assert set(dense) == {"prefill/batch2", "decode/batch2"}
    assert set(pruned) == set(dense) | {"prefill_speedup/batch2", "decode_speedup/batch2", "decode_bound/batch2"}
    prefill, decode = dense["prefill/batch2"], pruned["decode/batch2"]
    assert (prefill.value, prefill.low, prefill.high, prefill.n) == (16 / 4, 16 / 8, 16 / 2, 3)
    assert (decode.value, decode.low, decode.high) == (6 / 4, 6 / 5, 6 / 3)
    speedup = pruned["decode_speedup/batch2"]
    ratios = [8 / 5, 6 / 4, 6 / 3]  # of the same round
    assert (speedup.value, speedup.low, speedup.high) == (median(ratios), min(ratios), max(ratios))
    assert pruned["prefill_speedup/batch2"].value == 2
    weights = [4 * sum(p.numel() for p in model.parameters()) for model in models.values()]
    cache = 2 * 4 * 2 * (2 * 2 * 4) * (9 + 10 + 11) / 3
    assert pruned["decode_bound/batch2"].value == pytest.approx((weights[0] + cache) / (weights[1] + cache))
    assert {one.name: one.how for one in found["pruned"] if one.how != "measured"} == {
        "decode_bound/batch2": "estimated"
    }
    assert {one.unit for one in found["dense"]} == {"tokens/s"}
    assert prefill.protocol["prefill_logits"] == "last position"
    assert (prefill.protocol["batch"], prefill.protocol["prompt_tokens"], prefill.protocol["rounds"]) == (2, 8, 3)
    assert prefill.same_protocol(pruned["prefill/batch2"])
    assert prefill.environment.dtype == "float32"


def test_a_larger_batch_reads_weights_once_and_more_cache() -> None:
    models = {"dense": tiny(), "pruned": tiny(channels=8)}
    found = by_name(speed_measurements(models, (1, 8), 4, 2, rounds=1, clock=scripted([1.0] * 16))["pruned"])
    assert (
        1 < found["decode_bound/batch8"].value < found["decode_bound/batch1"].value
    )  # the caches are alike: the gain is diluted
    assert found["decode/batch8"].value == 8 * found["decode/batch1"].value


def test_experts_that_leave_bound_little_where_a_token_is_alone() -> None:
    """A token takes as many as before, and a batch chooses among fewer; the bound says what it counts."""
    dense, pruned = (AutoModelForCausalLM.from_config(MixtralConfig(**MOE, num_local_experts=n)) for n in (8, 4))
    models = {"dense": dense, "pruned": pruned}
    found = by_name(speed_measurements(models, (1, 64), 4, 2, rounds=1, clock=scripted([1.0] * 16))["pruned"])
    alone, together = found["decode_bound/batch1"], found["decode_bound/batch64"]
    assert 1 < alone.value < 1.01 < 1.1 < together.value
    assert "of experts those that the batch is expected to choose" in str(alone.protocol["bytes"])


def test_a_masked_model_is_no_faster_and_says_why() -> None:
    dense = tiny()
    masked = copy.deepcopy(dense)
    with torch.no_grad():
        for parameter in masked.parameters():
            parameter[: parameter.shape[0] // 2] = 0
    found = by_name(
        speed_measurements({"dense": dense, "masked": masked}, (1,), 4, 2, rounds=2, clock=scripted([1.0] * 12))[
            "masked"
        ]
    )
    assert found["decode_bound/batch1"].value == 1
    for name in ("decode_speedup/batch1", "prefill_speedup/batch1"):
        assert (found[name].value, found[name].remark) == (1, "no speed-up: zeros are stored dense")


def test_a_smaller_model_that_is_no_faster_names_its_bound() -> None:
    models = {"dense": tiny(), "pruned": tiny(channels=8)}
    found = by_name(speed_measurements(models, (1,), 4, 2, rounds=1, warmup=0, clock=scripted([1.0] * 4))["pruned"])
    bound = found["decode_bound/batch1"].value
    assert f"no speed-up: measured 1.00, noise 0.02, against a bound of {bound:.2f}" in (
        found["decode_speedup/batch1"].remark or ""
    )


def test_one_model_alone_has_no_speed_up_and_models_are_left_as_they_were() -> None:
    model = tiny().train()
    found = speed_measurements({"dense": model}, (1,), 4, 2, rounds=1, clock=scripted([1.0] * 4))
    assert [one.name for one in found["dense"]] == ["prefill/batch1", "decode/batch1"]
    assert found["dense"][0].protocol["interleaved"] is False
    assert model.training


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batches": ()}, "batches=\\[\\]"),
        ({"batches": (1, 0)}, "batches=\\[1, 0\\]"),
        ({"rounds": 0}, "rounds=0"),
        ({"warmup": -1}, "warmup=-1"),
        ({"prompt_tokens": 9000}, "exceed the context of dense, 2048; lower --prompt-tokens"),
        ({"new_tokens": 0}, "both must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_a_forward(wrong: dict[str, object], message: str) -> None:
    def never(_: object) -> float:
        raise AssertionError("a model ran")

    with pytest.raises(DataError, match=message):
        speed_measurements(
            {"dense": tiny()}, **{"batches": (1,), "prompt_tokens": 4, "new_tokens": 2, **wrong}, clock=never
        )  # type: ignore[arg-type]
    with pytest.raises(DataError, match="0 models"):
        speed_measurements({}, clock=never)
