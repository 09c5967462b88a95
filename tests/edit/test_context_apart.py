"""Gates of each layer apart. Oracle: the model run with the gates of one layer alone, all others open, and what its
attention then adds to the stream, beside what the dense model's adds.
"""

from typing import Any

import pytest
import torch
from tests.edit.test_context_gates import FAMILIES, dense, ids, padding, places
from torch import Tensor, nn

from compresso.arch.base import arch_for
from compresso.edit.context_attention import attentions_of, release_
from compresso.edit.context_gates import ContextGates


def held(name: str) -> tuple[Any, ContextGates]:
    model = dense(name)
    gates = ContextGates(model, 8, 0.9, seed=1)
    gates.hold_(model)
    gates.at(2.0)
    return model, gates


def written(model: Any, mask: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What each layer's attention adds, and the stream before each layer."""
    added: list[Tensor] = []
    streams: list[Tensor] = []

    def before(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        streams.append(arguments[0] if arguments else named["hidden_states"])

    hooks = [one.register_forward_hook(lambda *given: added.append(given[2][0])) for one in attentions_of(model)]
    hooks += [one.register_forward_pre_hook(before, with_kwargs=True) for one in arch_for(model.config).blocks(model)]
    with torch.no_grad():
        model(ids(), attention_mask=mask, position_ids=places(mask), use_cache=False)
    for hook in hooks:
        hook.remove()
    return added, streams


@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_apart_is_the_model_with_the_gates_of_that_layer_alone(name: str) -> None:
    model, gates = held(name)
    mask = padding("left")
    real = mask.bool()
    try:
        with gates.apart(model):
            out = model(ids(), attention_mask=mask, position_ids=places(mask), use_cache=False).logits
            errors = [one.apart.error for one in gates.gates if one.apart is not None]
            assert gates.error() == torch.stack([e for e in errors if e is not None]).sum()
        offsets = [one.offset.detach().clone() for one in gates.gates]
        for i, error in enumerate(errors):
            for k, one in enumerate(gates.gates):
                one.offset.data.copy_(offsets[k] if k == i else torch.tensor([20.0]))
            cut, streams = written(model, mask)
            for one in gates.gates:
                one.offset.data.fill_(20.0)
            whole, _ = written(model, mask)
            share = (cut[i] - whole[i]).square().sum(-1) / streams[i].square().sum(-1)
            torch.testing.assert_close(error, share[real].mean(), rtol=1e-4, atol=1e-7)
            assert float(share[real].mean()) > 1e-6
    finally:
        release_(model)
    plain = model(ids(), attention_mask=mask, position_ids=places(mask), use_cache=False).logits
    torch.testing.assert_close(out[real], plain[real], rtol=0, atol=1e-5)


def test_a_frozen_body_is_not_passed_back_through() -> None:
    model, gates = held("llama")
    model.requires_grad_(False)
    try:
        with gates.apart(model):
            out = model(ids(), use_cache=False).logits
            assert not out.requires_grad
            gates.error().backward()
        assert all(one.queries.grad is not None and one.queries.grad.abs().sum() > 0 for one in gates.gates)
        assert all(one.apart is None for one in gates.gates)
    finally:
        release_(model)
        model.requires_grad_(True)
