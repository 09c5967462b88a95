"""Which linears are chosen, and that a weight is read the right way round."""

from typing import cast

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compresso.arch.base import Arch, arch_for
from compresso.errors import ArchError, RecipeError
from compresso.sweep.targets import Where, chosen, matrix, names_of


def made() -> tuple[PreTrainedModel, Arch]:
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, vocab_size=32
    )
    with torch.device("meta"):  # shapes are enough
        model = LlamaForCausalLM(config)
    return model, arch_for(config)


def test_everything_in_the_blocks_and_nothing_else() -> None:
    groups = chosen(*made(), Where())
    names = names_of(groups)
    assert len(names) == 21
    assert all(name.startswith("model.layers.") and name.endswith("_proj") for name in names)
    assert [len(group.names) for group in groups[0]] == [3, 1, 2, 1]


def test_ranges_patterns_and_exceptions_go_together() -> None:
    groups = chosen(
        *made(),
        Where(layers=(1, 3), modules=("*.mlp.*", "*.o_proj"), ignore=("*.gate_proj", "model.layers.2.*.o_proj")),
    )
    assert {layer: [group.names for group in here] for layer, here in groups.items()} == {
        1: [("model.layers.1.self_attn.o_proj",), ("model.layers.1.mlp.up_proj",), ("model.layers.1.mlp.down_proj",)],
        2: [("model.layers.2.mlp.up_proj",), ("model.layers.2.mlp.down_proj",)],
    }


def test_inputs_that_are_no_multiple_are_named() -> None:
    with pytest.raises(RecipeError, match=r"model\.layers\.0\.mlp\.down_proj has 24 inputs, no multiple of 16"):
        chosen(*made(), Where(), 16)


def test_shared_weights_are_refused() -> None:
    model, arch = made()
    layers = arch.blocks(model)
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(
        ArchError, match=r"layers\.0\.mlp\.up_proj shares its weight with model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        chosen(model, arch, Where())
    chosen(model, arch, Where(ignore=("*.up_proj",)))


def test_a_transposed_weight_is_seen_as_out_by_in_and_changed_in_place() -> None:
    module = nn.ModuleDict({"c": Conv1D(6, 4), "norm": nn.LayerNorm(4)})
    weight = matrix(module, "c")
    assert weight.shape == (6, 4)
    weight[2, 3] = 7
    assert float(cast(Conv1D, module["c"]).weight.detach()[3, 2]) == 7
    with pytest.raises(ArchError, match="norm is a LayerNorm, and only linears can be worked on"):
        matrix(module, "norm")
