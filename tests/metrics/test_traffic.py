"""Bytes that a token reads, the bound they set, and the words for what was measured; no clock."""

from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compresso.metrics.traffic import (
    LEAST_NOISE,
    Stored,
    Weights,
    bytes_bound,
    cache_bytes,
    mean_cache_read,
    paired,
    verdict,
    weight_bytes_read,
)
from compresso.runner.inspection import inspect
from tests.arch.conftest import MIXTURES, build
from tests.metrics.tiny import tiny

DENSE = Weights(bytes_read=100, zeros=0.0, tensors=(((4, 4), "torch.float32"),))
SMALLER = Weights(bytes_read=50, zeros=0.0, tensors=(((2, 4), "torch.float32"),))
OTHER_PACE = ": something other than reading weights sets the pace"
amounts = st.floats(1e-3, 1e6)


def test_a_token_reads_every_matrix_once_and_one_row_of_an_untied_embedding() -> None:
    untied, tied = tiny(False), tiny(True)
    total = sum(p.numel() for p in untied.parameters())
    assert weight_bytes_read(untied) == 4 * (total - 40 * 16)
    assert weight_bytes_read(tied) == 4 * sum(p.numel() for p in tied.parameters()) == weight_bytes_read(untied)
    assert weight_bytes_read(tiny(True, 8)) == weight_bytes_read(tied) - 4 * 2 * 3 * 16 * 16
    assert weight_bytes_read(tied.bfloat16()) == weight_bytes_read(untied) // 2


@pytest.mark.parametrize("name", MIXTURES)
def test_of_a_mixture_a_token_alone_reads_what_is_active_and_a_batch_at_most_all(name: str) -> None:
    """What is active is counted from shapes by `compresso.inspect`."""
    model = build(name)
    weights, tied = Weights.of(model), model.config.tie_word_embeddings
    row = 0 if tied else model.get_input_embeddings().weight.numel()
    assert weights.read(1) == pytest.approx(4 * (inspect(model)["parameters"]["active"] - row), rel=1e-12)
    read = [weights.read(batch) for batch in (1, 2, 8, 64, 4096)]
    assert read == sorted(read) and read[-1] <= weights.bytes_read == weight_bytes_read(model)
    assert read[-1] == pytest.approx(weights.bytes_read)


@pytest.mark.parametrize(("experts", "per_token", "batch"), [(4, 2, 2), (5, 1, 3), (4, 3, 2), (3, 3, 2)])
def test_as_many_experts_are_chosen_as_over_all_choices_of_a_batch(experts: int, per_token: int, batch: int) -> None:
    choices = list(product(combinations(range(experts), per_token), repeat=batch))
    mean = sum(len(set().union(*one)) for one in choices) / len(choices)
    assert Stored(1, experts, per_token).chosen(batch) == pytest.approx(mean)


def test_a_model_without_experts_reads_the_same_at_any_batch() -> None:
    weights = Weights.of(tiny())
    assert weights.read(1) == weights.read(64) == weights.bytes_read


def test_a_cache_holds_keys_and_values_of_all_positions() -> None:
    cache = tiny()(input_ids=torch.arange(14).view(2, 7), use_cache=True).past_key_values
    assert cache_bytes(cache) == 4 * 2 * 7 * 2 * (
        2 * 2 * 4
    )  # float32, sequences, positions, layers, keys and values of 2 heads of 4


@given(st.integers(0, 999), st.integers(0, 99), st.integers(1, 50))
def test_the_mean_read_is_that_of_steps_that_append_first(before: int, growth: int, steps: int) -> None:
    reads = [before + growth * (step + 1) for step in range(steps)]
    assert mean_cache_read(before, reads[-1], steps) == pytest.approx(sum(reads) / steps)


@given(amounts, amounts, amounts, amounts)
def test_the_bound_lies_between_those_of_weights_and_cache(
    dense: float, dense_cache: float, weights: float, cache: float
) -> None:
    bound = bytes_bound(dense, dense_cache, weights, cache)
    ends = sorted((dense / weights, dense_cache / cache))
    assert ends[0] * (1 - 1e-9) <= bound <= ends[1] * (1 + 1e-9)
    assert bytes_bound(dense, 0, weights, 0) == pytest.approx(dense / weights)
    assert bytes_bound(weights, cache, dense, dense_cache) == pytest.approx(1 / bound)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=9), st.floats(0.2, 5))
def test_drift_of_the_machine_cancels_within_rounds(drift: list[float], speedup: float) -> None:
    ratios, noise = paired([speedup * slow for slow in drift], drift)
    assert ratios == pytest.approx([speedup] * len(drift))
    assert noise == LEAST_NOISE


def test_noise_is_twice_the_median_distance() -> None:
    ratios, noise = paired([1.0, 1.2, 1.4, 9.0, 0.9], [1.0] * 5)
    assert ratios == [1.0, 1.2, 1.4, 9.0, 0.9]
    assert noise == pytest.approx(2 * 0.2)  # distances from 1.2: .2, 0, .2, 7.8, .3


def test_zeros_are_counted_in_matrices() -> None:
    model = tiny()
    assert Weights.of(model).zeros == 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[: parameter.shape[0] // 2] = 0
    assert Weights.of(model).zeros == pytest.approx(0.5)
    assert Weights.of(model).tensors == Weights.of(tiny()).tensors != Weights.of(tiny(channels=8)).tensors


@pytest.mark.parametrize(
    ("speedup", "weights", "bound", "words"),
    [
        (1.0, replace(DENSE, zeros=0.5), 1.0, "no speed-up: zeros are stored dense"),
        (0.7, replace(DENSE, zeros=0.5), None, "no speed-up: zeros are stored dense"),
        (1.0, DENSE, 1.0, "no speed-up: every tensor is as large as the dense model's"),
        (1.3, DENSE, 1.0, "not an effect of size: every tensor is as large as the dense model's"),
        (1.02, SMALLER, 2.0, "no speed-up: measured 1.02, noise 0.05, against a bound of 2.00" + OTHER_PACE),
        (0.9, SMALLER, 1.01, "no speed-up: measured 0.90, noise 0.05, against a bound of 1.01"),
        (1.0, SMALLER, None, "no speed-up: measured 1.00, noise 0.05"),
        (1.0, replace(SMALLER, zeros=0.25), None,
         "no speed-up: measured 1.00, noise 0.05; 25% of its matrices are zeros, stored dense"),
        (1.9, SMALLER, 2.0, None),
        (1.9, SMALLER, None, None),
        (2.05, SMALLER, 2.0, None),
        (2.5, SMALLER, 2.0, "above the bound of 2.00: reading fewer bytes does not explain all of it"),
    ],
)  # fmt: skip
def test_the_words_beside_a_speed_up(speedup: float, weights: Weights, bound: float | None, words: str | None) -> None:
    assert verdict([0.9 * speedup, speedup, speedup], 0.05, weights, DENSE, bound) == words


def test_a_noisy_speed_up_is_one_if_every_round_shows_it_and_else_uncertain() -> None:
    assert verdict([1.06, 2.2, 3.2], 1.9, SMALLER, DENSE, 2.0) is None
    assert (
        verdict([0.9, 2.2, 3.2], 1.9, SMALLER, DENSE, 2.0)
        == "uncertain: measured 2.20, noise 1.90, against a bound of 2.00; more rounds or a quieter machine would tell"
    )
