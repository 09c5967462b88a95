"""Weights in another order of inputs and inputs gathered: the same function, one gather for those that share, and files
as they were.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.edit.test_prefill import model_of
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compresso.edit.gather import gather_inputs_, restore_inputs_
from compresso.errors import ArchError

IDS = torch.arange(1, 20).unsqueeze(0)


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=24, n_layer=2, n_head=3)).eval()


def across(model: PreTrainedModel) -> int:
    return 0 if isinstance(model, GPT2LMHeadModel) else 1


def orders_of(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Random orders for all linears of the blocks; q, k and v share one, and so do gate and up."""
    groups: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and "lm_head" not in name:
            parent, _, own = name.rpartition(".")
            shared = "qkv" if own[0] in "qkv" else "up" if own in ("gate_proj", "up_proj") else own
            groups.setdefault(f"{parent}.{shared}", []).append(name)
    source = torch.Generator().manual_seed(1)
    widths = {key: model.get_submodule(names[0]).weight.shape[across(model)] for key, names in groups.items()}
    return [
        {"linears": names, "order": torch.randperm(widths[key], generator=source).tolist()}
        for key, names in groups.items()
    ]


@pytest.mark.parametrize("make", [gpt2, lambda: model_of("llama"), lambda: model_of("qwen2")])
@torch.no_grad()
def test_the_same_function_over_weights_that_moved_and_back(
    make: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    model, dense = make().double(), make().double()
    orders = orders_of(model)
    assert len(orders) >= 2 * 4
    gather_inputs_(model, orders)
    gather_inputs_(model, orders)  # a second time moves nothing twice
    for group in orders:
        for name in group["linears"]:
            before, after = dense.get_submodule(name).weight, model.get_submodule(name).weight
            assert torch.equal(after, before.index_select(across(model), torch.tensor(group["order"])))
            assert not torch.equal(after, before)
    torch.testing.assert_close(model(input_ids=IDS).logits, dense(input_ids=IDS).logits)
    torch.testing.assert_close(model(input_ids=IDS[:, :7]).logits, dense(input_ids=IDS[:, :7]).logits)
    kept = dense.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path)
    opened = type(dense).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in opened.items())
    restore_inputs_(model)
    assert torch.equal(model(input_ids=IDS).logits, dense(input_ids=IDS).logits)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_linears_that_share_an_order_gather_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    orders = orders_of(model)
    gather_inputs_(model, orders)
    calls: list[int] = []
    plain = torch.Tensor.index_select
    monkeypatch.setattr(torch.Tensor, "index_select", lambda *args: (calls.append(1), plain(*args))[1])
    model(input_ids=IDS)
    assert len(calls) == len(orders)


def test_inputs_that_changed_in_place_are_gathered_again() -> None:
    linear = nn.Linear(4, 2, bias=False)
    other = nn.Linear(4, 2, bias=False)
    holder = nn.ModuleDict({"one": linear, "two": other})
    inputs = torch.randn(3, 4)
    wanted = linear(inputs).detach(), other(inputs * 2).detach()
    gather_inputs_(holder, [{"linears": ["one", "two"], "order": [2, 0, 3, 1]}])  # type: ignore[arg-type]
    first = linear(inputs)
    inputs *= 2
    torch.testing.assert_close((first, other(inputs)), wanted)


def test_gradients_reach_the_inputs() -> None:
    model = model_of("llama")
    gather_inputs_(model, orders_of(model))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert model.get_input_embeddings().weight.grad is not None


def test_what_does_not_fit_is_refused_and_moves_nothing() -> None:
    model = model_of("llama")
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    good = orders_of(model)[0]
    with pytest.raises(
        ArchError, match=r"inputs of model\.layers\.9\.mlp cannot be gathered: the model has no such module"
    ):
        gather_inputs_(model, [good, {"linears": ["model.layers.9.mlp"], "order": [0]}])
    for wrong in ([0, 1], [0] * len(good["order"])):
        with pytest.raises(ArchError, match="its order does not name each of its inputs once"):
            gather_inputs_(model, [good, {"linears": good["linears"], "order": wrong}])
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
