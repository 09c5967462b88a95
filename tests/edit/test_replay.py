"""Blocks that are replayed give the gradients of blocks whose activations are kept, and are only replayed where all
that their output depends on is known.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError
from transformers import LlamaForCausalLM

from compresso.arch.base import arch_for
from compresso.edit import replay
from compresso.edit.gate import gated
from compresso.edit.lora import attach_
from compresso.edit.recompute import recompute_

Make = Callable[..., LlamaForCausalLM]
IDS = torch.arange(2, 14).reshape(2, 6)
LAYERS = 3


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many blocks were replayed, as one number a backward pass of a block."""
    found: list[int] = []
    backward = replay._Replayed.backward

    def counted(ctx: object, *outgoing: Tensor) -> tuple[Tensor | None, ...]:
        found.append(1)
        return backward(ctx, *outgoing)

    monkeypatch.setattr(replay._Replayed, "backward", staticmethod(counted))
    yield found


def masks_of(model: LlamaForCausalLM) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    axes = [axis for axis in arch_for(model.config).axes(model) if axis.kind in ("head", "channel", "hidden")]
    return {axis.name: torch.rand(2, axis.size, generator=generator).requires_grad_() for axis in axes}


def gradients(model: LlamaForCausalLM, *, again: bool, bf16: bool, dropout: float, updates: int = 2) -> list[Tensor]:
    """Those of adapters and masks, summed over updates; the first update is torch's where blocks are recomputed."""
    masks = masks_of(model)
    axes = arch_for(model.config).axes(model)
    adapted = attach_(model.train(), rank=2, alpha=2, dropout=dropout)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(5))
    if again:
        recompute_(model, on=True)
    with gated(adapted, axes, {}) as sites:
        for update in range(updates):
            torch.manual_seed(update)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                sites.set({name: mask * 1.0 for name, mask in masks.items()})  # no leaves, as sampled ones are none
                loss = adapted(input_ids=IDS, labels=IDS, use_cache=False).loss
            loss.backward()
    found = [*(p.grad for p in adapted.parameters() if p.requires_grad), *(mask.grad for mask in masks.values())]
    assert all(one is not None for one in found)
    return [one for one in found if one is not None]


@pytest.mark.parametrize(("bf16", "dropout"), [(False, 0.0), (True, 0.0), (False, 0.5)])
def test_gradients_are_those_of_kept_activations(make: Make, replays: list[int], bf16: bool, dropout: float) -> None:
    kept = gradients(make(), again=False, bf16=bf16, dropout=dropout)
    assert not replays
    again = gradients(make(), again=True, bf16=bf16, dropout=dropout)
    assert len(replays) == LAYERS  # in the second update
    for a, b in zip(kept, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_nothing_is_kept_of_a_block_but_its_input_and_what_learns(make: Make) -> None:
    model = make().train()
    adapted = attach_(model, rank=2, alpha=2)
    recompute_(model, on=True)
    adapted(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        model.model.layers[0](torch.ones(2, 6, model.config.hidden_size, requires_grad=True), **positions(model))
    assert len(kept) == 1 + 2 * 2


def positions(model: LlamaForCausalLM) -> dict[str, object]:
    places = torch.arange(6)[None]
    return {"position_embeddings": model.model.rotary_emb(torch.ones(2, 6, 1), places)}


class Shifting(nn.Linear):
    """A linear that adds what no module knows of."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in]."""
        return super().forward(x) + HIDDEN[0]


HIDDEN: list[Tensor] = []


def test_a_tensor_that_nobody_knows_gets_its_gradient(make: Make, replays: list[int]) -> None:
    found: list[Tensor] = []
    for again in (False, True):
        model = make().train()
        model.model.layers[1].mlp.down_proj.__class__ = Shifting
        leaf = torch.zeros(model.config.hidden_size, requires_grad=True)
        HIDDEN[:] = [leaf * 2]
        if again:
            recompute_(model, on=True)
        for _ in range(2):
            HIDDEN[:] = [leaf * 2]
            model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        assert leaf.grad is not None and leaf.grad.abs().sum() > 0
        found.append(leaf.grad)
    torch.testing.assert_close(*found)
    assert len(replays) == LAYERS - 1  # all but the one that is not known


def test_under_foreign_hooks_torch_recomputes(make: Make, replays: list[int]) -> None:
    model = make().train()
    seen: list[Tensor] = []
    model.model.layers[2].mlp.register_forward_hook(lambda _, __, output: seen.append(output))
    recompute_(model, on=True)
    for _ in range(2):
        seen.clear()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert seen[0].requires_grad and len(replays) == LAYERS - 1


def test_hooks_that_come_later_are_noticed(make: Make, replays: list[int]) -> None:
    model = make().train()
    recompute_(model, on=True)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert len(replays) == LAYERS
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert len(replays) == LAYERS + LAYERS - 1
    handle.remove()
    model.model.layers[1].mlp.down_proj.weight.requires_grad_(False)  # other parameters: proven anew
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert len(replays) == LAYERS + LAYERS - 1 + LAYERS - 1


@pytest.mark.parametrize("how", ["parameter's hook", "mask's hook", "mask's kept gradient"])
def test_hooks_of_tensors_see_each_gradient_once(make: Make, how: str) -> None:
    found: list[list[Tensor | None]] = []
    for again in (False, True):
        model = make().train()
        masks = {name: mask.detach()[0].requires_grad_() for name, mask in masks_of(model).items()}
        axes = arch_for(model.config).axes(model)
        for one in model.model.layers.parameters() if how == "parameter's hook" else masks.values():
            if how != "mask's kept gradient":
                one.register_hook(lambda gradient: gradient * 2)
        recompute_(model, on=again)
        kept: list[Tensor] = []
        with gated(model, axes, {}) as sites:
            for _ in range(2):
                given = masks
                if how == "mask's kept gradient":
                    given = {name: mask * 1.0 for name, mask in masks.items()}
                    kept = list(given.values())
                    for mask in kept:
                        mask.retain_grad()
                sites.set(given)
                model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        found.append([one.grad for one in (*model.model.layers.parameters(), *masks.values(), *kept)])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("how", ["left", "set anew"])
def test_other_masks_in_the_backward_pass_are_noticed(make: Make, how: str) -> None:
    model = make().train()
    masks, axes = masks_of(model), arch_for(model.config).axes(model)
    recompute_(model, on=True)
    with gated(model, axes, masks) as sites:
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        if how == "set anew":
            sites.set({name: mask.detach() for name, mask in masks.items()})
            with pytest.raises(CheckpointError, match="set anew"):
                loss.backward()
    if how == "left":
        with pytest.raises(CheckpointError, match="inside the context"):
            loss.backward()
