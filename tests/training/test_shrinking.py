"""Units that shrink while adapters learn: exact zeros at the end, whatever is skipped, and zero means gone."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from compresso.arch.base import arch_for
from compresso.core.axis import Axis, Kind
from compresso.core.loss import NEXT_TOKEN
from compresso.edit.gate import gated
from compresso.edit.lora import attach_, merge_
from compresso.solve.greedy import Flat
from compresso.training.order import Micro
from compresso.training.shrinking import ShrinkingObjective

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IDS = torch.arange(1, 13)[None]
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}


def dense() -> tuple[LlamaForCausalLM, list[Axis]]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    return model, [axis for axis in arch_for(config).axes(model) if axis.kind in (Kind.HEAD, Kind.CHANNEL)]


def objective(**knobs: Any) -> ShrinkingObjective:
    """Periods of 4 updates from update 2 on; the first takes each axis' unit 0, the second unit 1."""
    model, axes = dense()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def first_units(period: int, scores: Mapping[str, Tensor], gone: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert all(int(left.sum()) == period - 1 for left in gone.values())
        assert all(score.isfinite().all() for score in scores.values())
        return {axis.name: (torch.arange(axis.size) >= period).float() for axis in axes}

    made: dict[str, Any] = {
        "loss": NEXT_TOKEN,
        "starts": 2,
        "length": 4,
        "periods": 1,
        "eps": 0.0,
        "criteria": {"magnitude": 1.0},
        "within_kinds": True,
    } | knobs
    adapted = attach_(model, 2, 4.0, ALL)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return ShrinkingObjective(adapted, axes, weights, first_units, **made)


def scales(tested: ShrinkingObjective, updates: range, skipped: tuple[int, ...] = ()) -> list[list[float]]:
    """Units 0 and 1 of the first axis after each update."""
    seen: list[list[float]] = []
    with tested.attached():
        for update in updates:
            tested(BATCH, Micro(update, 0, range(1)))
            if update not in skipped:
                tested.shrink_(update)
            seen.append(tested.scale[:2].tolist())
    return seen


def test_a_period_shrinks_its_units_linearly_to_exact_zero() -> None:
    """(T - 1 - t) / (T - 1) at step t, nothing before the start, and the second period only after the first."""
    tested = objective(periods=2)
    seen = scales(tested, range(11))
    assert [first for first, _ in seen] == pytest.approx([1, 1, 1, 2 / 3, 1 / 3, 0, 0, 0, 0, 0, 0])
    assert [second for _, second in seen] == pytest.approx([1, 1, 1, 1, 1, 1, 1, 2 / 3, 1 / 3, 0, 0])
    assert seen[5][0] == seen[9][1] == 0.0
    assert int((tested.scale == 0).sum()) == 2 * len(tested.axes)
    assert int((tested.scale == 1).sum()) == tested.scale.numel() - 2 * len(tested.axes)


@pytest.mark.parametrize("skipped", [(3,), (4,), (5,), (3, 4), (5, 6)])
def test_a_skipped_update_loses_no_choice_and_leaves_no_remainder(skipped: tuple[int, ...]) -> None:
    tested = objective()
    scales(tested, range(7), skipped)
    tested.shrink_(7)
    assert all(mask.tolist() == [0.0] + [1.0] * (len(mask) - 1) for mask in tested.masks().values())


def test_masks_are_refused_while_units_shrink() -> None:
    tested = objective()
    scales(tested, range(5))
    with pytest.raises(RuntimeError, match="still shrinking"):
        tested.masks()


def test_a_half_space_that_is_nearly_all_ends_a_group_at_once() -> None:
    """eps 0.9: after the first factor of 2/3 less than 0.9 is left along the old direction."""
    tested = objective(eps=0.9)
    assert [first for first, _ in scales(tested, range(4))] == [1, 1, 1, 0]


def test_a_group_that_turns_round_is_zero_at_once_even_at_eps_0() -> None:
    """Layer 0's channels are all adapter, and an update reverses it; layer 1's only shrink by the factor of 2/3."""
    tested = objective()
    ours = [parameter for name, parameter in tested.model.named_parameters() if "layers.0.mlp" in name]
    adapters = [
        parameter for name, parameter in tested.model.named_parameters() if "layers.0.mlp" in name and "lora_B" in name
    ]
    with torch.no_grad():
        for parameter in ours:
            if not parameter.requires_grad:
                parameter.mul_(1e-6)
    scales(tested, range(3))
    with tested.attached(), torch.no_grad():
        tested(BATCH, Micro(3, 0, range(1)))
        for parameter in adapters:
            parameter.neg_()
        tested.shrink_(3)
    first = {axis.name: float(tested.scale[at]) for axis, at in zip(tested.axes, Flat(tested.axes).starts, strict=True)}
    assert first.pop("layers.0.channels") == 0.0
    assert list(first.values()) == pytest.approx([2 / 3] * 3)


def test_the_state_rides_along_with_the_adapters() -> None:
    saved = set(objective().state_dict())
    assert {"scale", "turn", "chosen"} <= saved


def test_zeroing_a_group_s_weights_is_masking_it() -> None:
    """Rows of W and B, columns of W and A set to zero: the adapted model then computes what the masked one does."""
    tested = objective()
    scales(tested, range(6))
    masks = tested.masks()
    with torch.no_grad(), gated(tested.model, tested.axes, masks):
        masked = tested.model(input_ids=IDS).logits
    model = merge_(tested.model)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for axis in tested.axes:
            for piece in axis.slices:
                parameters[piece.param].movedim(piece.dim, 0)[: piece.width] = 0
        torch.testing.assert_close(model(input_ids=IDS).logits, masked, rtol=0, atol=1e-5)
