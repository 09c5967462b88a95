"""Llama, Mistral, Qwen2 and Qwen3 some of whose linears are products of two, for checkpoints that compresso factored.

This one file is all that such a checkpoint needs beside its weights: it lies in the checkpoint too, so it imports
transformers, torch and huggingface_hub only. Each family is transformers' own. Only the linears that `config.ranks`
names are others: W x + b is computed as left (right x) + b, with `right` [rank, in] and `left` [out, rank].
"""
# The classes below are four times the same two, named; the mixin takes its attributes from the family's class.
# ruff: noqa: D101
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralForCausalLM
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM


class Factored(nn.Module):
    """A linear as a product of two; the bias is that of the second."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.right = nn.Linear(linear.in_features, rank, bias=False, **like)
        self.left = nn.Linear(rank, linear.out_features, bias=linear.bias is not None, **like)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.left(self.right(hidden))


def factor_(model: nn.Module, ranks: dict[str, int]) -> None:
    """Put a product in the place of each linear that is named; ValueError for what is none, and for no rank of it."""
    linears = {
        name: one
        for name, one in model.named_modules()
        if isinstance(one, nn.Linear) and name.startswith("model.layers.")
    }
    for name, rank in ranks.items():
        if name not in linears:
            raise ValueError(f"ranks names {name[:80]}, which is no linear of a layer.")
        linear = linears[name]
        if not 1 <= rank <= min(linear.in_features, linear.out_features):
            raise ValueError(
                f"ranks gives {name} the rank {rank}; wanted 1 to {min(linear.in_features, linear.out_features)}."
            )
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, Factored(linear, rank))


class LowRankForCausalLM:
    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        factor_(self, config.ranks or {})


@strict
class CompressoLowRankLlamaConfig(LlamaConfig):
    """`ranks`: of the linears that are products of two, by their full names."""

    model_type = "compresso_lowrank_llama"
    ranks: dict[str, int] | None = None


class CompressoLowRankLlamaForCausalLM(LowRankForCausalLM, LlamaForCausalLM):
    config_class = CompressoLowRankLlamaConfig


@strict
class CompressoLowRankMistralConfig(MistralConfig):
    """See `CompressoLowRankLlamaConfig`."""

    model_type = "compresso_lowrank_mistral"
    ranks: dict[str, int] | None = None


class CompressoLowRankMistralForCausalLM(LowRankForCausalLM, MistralForCausalLM):
    config_class = CompressoLowRankMistralConfig


@strict
class CompressoLowRankQwen2Config(Qwen2Config):
    """See `CompressoLowRankLlamaConfig`."""

    model_type = "compresso_lowrank_qwen2"
    ranks: dict[str, int] | None = None


class CompressoLowRankQwen2ForCausalLM(LowRankForCausalLM, Qwen2ForCausalLM):
    config_class = CompressoLowRankQwen2Config


@strict
class CompressoLowRankQwen3Config(Qwen3Config):
    """See `CompressoLowRankLlamaConfig`."""

    model_type = "compresso_lowrank_qwen3"
    ranks: dict[str, int] | None = None


class CompressoLowRankQwen3ForCausalLM(LowRankForCausalLM, Qwen3ForCausalLM):
    config_class = CompressoLowRankQwen3Config
