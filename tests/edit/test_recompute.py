"""Recomputed activations give the same gradients, under either name that transformers has for the switch."""

import types

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compresso.edit.recompute import recompute_


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=64)
    ).train()


def _gradient(model: LlamaForCausalLM) -> torch.Tensor:
    ids = torch.arange(16).unsqueeze(0)
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    gradient = model.model.layers[0].mlp.up_proj.weight.grad
    assert gradient is not None
    return gradient.clone()


def test_recomputed_gradients_are_the_same() -> None:
    model = _model()
    plain = _gradient(model)
    calls: list[int] = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    recompute_(model, on=True)
    torch.testing.assert_close(_gradient(model), plain)
    assert len(calls) == 2  # forward, and again in the backward pass
    recompute_(model, on=False)
    torch.testing.assert_close(_gradient(model), plain)
    assert len(calls) == 3


@pytest.mark.parametrize("name", ["activation", "gradient"])
def test_either_name(name: str) -> None:
    said: list[tuple[str, object]] = []
    model = types.SimpleNamespace(
        **{
            f"{name}_checkpointing_enable": lambda knobs: said.append(("on", knobs)),
            f"{name}_checkpointing_disable": lambda: said.append(("off", None)),
        }
    )
    recompute_(model, on=True)  # type: ignore[arg-type]
    recompute_(model, on=False)  # type: ignore[arg-type]
    assert said == [("on", {"use_reentrant": False}), ("off", None)]
