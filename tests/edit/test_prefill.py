"""Layers skipped in prefill: the slot of the cache holds what dense decoding expects, and nothing else changes."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM as Auto
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from compresso.arch.base import arch_for
from compresso.core.plan import Plan
from compresso.edit.patches import patch_, read_patches, unpatch_
from compresso.edit.prefill import prefill_patch, skip_in_prefill_
from compresso.edit.shrink import shrink_
from compresso.errors import ArchError

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
FAMILIES: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
IDS = torch.tensor([[5, 9, 2, 7, 3, 1, 8]])
every_family = pytest.mark.parametrize("family", FAMILIES)


def model_of(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = (
        FAMILIES[family](**SIZES, vocab_size=64, head_dim=8)
        if family != "qwen2"
        else FAMILIES[family](**SIZES, vocab_size=64)
    )
    model = Auto.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                torch.randn_like(parameter) * (0.3 if parameter.dim() == 2 else 0.1)
                + (0 if parameter.dim() == 2 else float("norm" in name))
            )
    return model


@every_family
def test_without_layers_it_is_the_dense_model_bit_for_bit(family: str) -> None:
    model = model_of(family)
    dense = model(input_ids=IDS).logits
    skip_in_prefill_(model, [])
    assert torch.equal(model(input_ids=IDS).logits, dense)


@every_family
@torch.no_grad()
def test_a_slot_holds_the_rotated_keys_and_the_values_of_what_the_layer_would_have_read(family: str) -> None:
    model = model_of(family)
    skip_in_prefill_(model, [1, 2])
    seen: dict[int, Tensor] = {}
    for i, block in enumerate(model.model.layers):
        block.register_forward_pre_hook(lambda _, inputs, i=i: seen.__setitem__(i, inputs[0]))
    cache = model(input_ids=IDS, use_cache=True).past_key_values
    torch.testing.assert_close(seen[2], seen[1], rtol=0, atol=0)
    torch.testing.assert_close(seen[3], seen[1], rtol=0, atol=0)
    unpatch_(model)
    for layer in (1, 2):  # what the dense layer itself caches of that stream
        filled: list[Tensor] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(cache), "update", lambda self, k, v, *_, filled=filled: filled.extend((k, v)) or (k, v))
            rotation = model.model.rotary_emb(seen[layer], torch.arange(IDS.shape[1]).unsqueeze(0))
            model.model.layers[layer](
                seen[layer], position_embeddings=rotation, past_key_values=cache, attention_mask=None
            )
        torch.testing.assert_close(cache.layers[layer].keys, filled[0])
        torch.testing.assert_close(cache.layers[layer].values, filled[1])


@every_family
@torch.no_grad()
def test_a_single_token_runs_every_layer(family: str) -> None:
    model = model_of(family)
    skip_in_prefill_(model, [0, 2])
    cache = model(input_ids=IDS, use_cache=True).past_key_values
    token = torch.tensor([[4]])
    patched = model(input_ids=token, past_key_values=copy.deepcopy(cache), use_cache=True).logits
    unpatch_(model)
    assert torch.equal(model(input_ids=token, past_key_values=copy.deepcopy(cache), use_cache=True).logits, patched)


@torch.no_grad()
def test_a_scored_text_sees_the_model_without_those_layers() -> None:
    model = model_of("llama")
    shorter = copy.deepcopy(model)
    shrink_(shorter, arch_for(model.config).axes(shorter), Plan({"layers": (0, 3)}))
    skip_in_prefill_(model, [1, 2])
    torch.testing.assert_close(
        model(input_ids=IDS, use_cache=False).logits, shorter(input_ids=IDS, use_cache=False).logits
    )
    written = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False)
    assert written.shape == (1, IDS.shape[1] + 6)


def test_patches_have_names_and_wrong_ones_say_why() -> None:
    model = model_of("llama")
    dense = model(input_ids=IDS).logits
    patch_(model, [prefill_patch([2])])
    assert not torch.equal(model(input_ids=IDS).logits, dense)
    unpatch_(model)
    assert torch.equal(model(input_ids=IDS).logits, dense)
    with pytest.raises(ArchError, match="layer 4 cannot be skipped: the model has layers 0 to 3"):
        skip_in_prefill_(model, [4])
    with pytest.raises(ArchError, match="forward patch 'merge_tokens 3' is unknown"):
        patch_(model, read_patches(["merge_tokens 3"]))
