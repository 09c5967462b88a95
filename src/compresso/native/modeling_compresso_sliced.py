"""Llama, Mistral, Qwen2, Qwen3, OPT and GPT-2 with a narrower residual stream, for checkpoints that compresso sliced.

This one file is all that such a checkpoint needs beside its weights: it lies in the checkpoint too, so it imports
transformers, torch and huggingface_hub only. Attentions, FFNs and caches are transformers' own, with linears that read
and write `config.stream_width` dimensions. What is others': norms have no gain and divide by the root of the mean over
the original `hidden_size`; what is added to is first rotated by a shortcut, attention_shortcut or mlp_shortcut; the
head is never tied and reads `config.head_width` dimensions; of OPT and GPT-2 it has a bias, and norms take no mean off.
"""
# The classes below are six times the same two, named; the mixin takes its attributes from the family's class.
# ruff: noqa: D101
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportIncompatibleMethodOverride=false, reportOptionalMemberAccess=false

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Block, GPT2LMHeadModel
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralForCausalLM
from transformers.models.opt.configuration_opt import OPTConfig
from transformers.models.opt.modeling_opt import OPTDecoderLayer, OPTForCausalLM, OPTLearnedPositionalEmbedding
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2ForCausalLM
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM
from transformers.pytorch_utils import Conv1D


class SlicedNorm(nn.Module):
    """Divides by the root of a mean square over the original width, of whose dimensions those left are a part."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        mean = wide.square().sum(dim=-1, keepdim=True) / self.width
        return (wide * torch.rsqrt(mean + self.eps)).to(hidden.dtype)


def widths_of(config: PreTrainedConfig, layer: int) -> tuple[int, int]:
    """What a layer reads and what it writes. Raises ValueError for widths that this model cannot have."""
    for name in ("stream_width", "head_width"):
        value = getattr(config, name)
        if not 1 <= value <= config.hidden_size:
            raise ValueError(f"{name} is {value}; wanted 1 to hidden_size={config.hidden_size}.")
    last = layer == config.num_hidden_layers - 1
    return config.stream_width, config.head_width if last else config.stream_width


def resize_(owner: nn.Module, name: str, inputs: int | None = None, outputs: int | None = None) -> None:
    """Put a linear of other widths in the place of one."""
    where, _, own = name.rpartition(".")
    parent = owner.get_submodule(where)
    linear = getattr(parent, own)
    if isinstance(linear, Conv1D):
        rows, columns = linear.weight.shape
        setattr(parent, own, Conv1D(outputs or columns, inputs or rows))
    else:
        made = nn.Linear(inputs or linear.in_features, outputs or linear.out_features, bias=linear.bias is not None)
        setattr(parent, own, made)


def slice_(
    layer: nn.Module, config: PreTrainedConfig, index: int, halves: tuple[tuple[str, tuple[str, ...], str], ...]
) -> None:
    """Give a layer its widths and shortcuts.

    halves: of attention and FFN the norm, the linears that read and the one that writes.
    """
    width, last = widths_of(config, index)
    for (norm, reads, write), out in zip(halves, (width, last), strict=True):
        eps = (
            getattr(layer, norm).eps if hasattr(getattr(layer, norm), "eps") else getattr(layer, norm).variance_epsilon
        )
        setattr(layer, norm, SlicedNorm(config.hidden_size, eps))
        for name in reads:
            resize_(layer, name, inputs=width)
        resize_(layer, write, outputs=out)
    layer.attention_shortcut = nn.Linear(width, width, bias=False)
    layer.mlp_shortcut = nn.Linear(width, last, bias=False)


_LLAMA = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj"),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
)
_OPT = (
    ("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.out_proj"),
    ("final_layer_norm", ("fc1",), "fc2"),
)
_GPT2 = (("ln_1", ("attn.c_attn",), "attn.c_proj"), ("ln_2", ("mlp.c_fc",), "mlp.c_proj"))


class SlicedLlamaLayer:
    """A layer of Llama's form."""

    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        slice_(self, config, layer_idx, _LLAMA)

    def forward(self, hidden_states: Tensor, **given: Any) -> Tensor:
        written, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **given)
        hidden_states = self.attention_shortcut(hidden_states) + written
        return self.mlp_shortcut(hidden_states) + self.mlp(self.post_attention_layernorm(hidden_states))


class SlicedLlamaDecoderLayer(SlicedLlamaLayer, LlamaDecoderLayer):
    pass


class SlicedMistralDecoderLayer(SlicedLlamaLayer, MistralDecoderLayer):
    pass


class SlicedQwen2DecoderLayer(SlicedLlamaLayer, Qwen2DecoderLayer):
    pass


class SlicedQwen3DecoderLayer(SlicedLlamaLayer, Qwen3DecoderLayer):
    pass


class SlicedOPTDecoderLayer(OPTDecoderLayer):
    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        slice_(self, config, layer_idx, _OPT)

    def forward(self, hidden_states: Tensor, **given: Any) -> Tensor:
        written, _ = self.self_attn(hidden_states=self.self_attn_layer_norm(hidden_states), **given)
        hidden_states = self.attention_shortcut(hidden_states) + self._dropped(written)
        written = self.fc2(self.activation_fn(self.fc1(self.final_layer_norm(hidden_states))))
        return self.mlp_shortcut(hidden_states) + self._dropped(written)

    def _dropped(self, written: Tensor) -> Tensor:
        return nn.functional.dropout(written, p=self.dropout, training=self.training)


class SlicedGPT2Block(GPT2Block):
    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        slice_(self, config, layer_idx, _GPT2)

    def forward(self, hidden_states: Tensor, *arguments: Any, **given: Any) -> Tensor:
        cache = arguments[0] if arguments else given.pop("past_key_values", None)
        mask = arguments[1] if len(arguments) > 1 else given.pop("attention_mask", None)
        for name in ("encoder_hidden_states", "encoder_attention_mask"):
            given.pop(name, None)
        read = self.ln_1(hidden_states)
        written, _ = self.attn(read, past_key_values=cache, attention_mask=mask, **given)
        hidden_states = self.attention_shortcut(hidden_states) + written
        return self.mlp_shortcut(hidden_states) + self.mlp(self.ln_2(hidden_states))


class SlicedLlamaForm:
    """A language model of Llama's form."""

    layer_class: type[nn.Module]

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        width, _ = widths_of(config, 0)
        inner = self.model
        eps = inner.norm.variance_epsilon
        inner.embed_tokens = nn.Embedding(config.vocab_size, width, inner.embed_tokens.padding_idx)
        inner.layers = nn.ModuleList(self.layer_class(config, i) for i in range(config.num_hidden_layers))
        inner.norm = SlicedNorm(config.hidden_size, eps)
        self.lm_head = nn.Linear(config.head_width, config.vocab_size, bias=False)


@strict
class CompressoSlicedLlamaConfig(LlamaConfig):
    """`stream_width`: dimensions of the stream; `head_width`: of what the head reads."""

    model_type = "compresso_sliced_llama"
    stream_width: int = 0
    head_width: int = 0


class CompressoSlicedLlamaForCausalLM(SlicedLlamaForm, LlamaForCausalLM):
    config_class = CompressoSlicedLlamaConfig
    layer_class = SlicedLlamaDecoderLayer


@strict
class CompressoSlicedMistralConfig(MistralConfig):
    """See `CompressoSlicedLlamaConfig`."""

    model_type = "compresso_sliced_mistral"
    stream_width: int = 0
    head_width: int = 0


class CompressoSlicedMistralForCausalLM(SlicedLlamaForm, MistralForCausalLM):
    config_class = CompressoSlicedMistralConfig
    layer_class = SlicedMistralDecoderLayer


@strict
class CompressoSlicedQwen2Config(Qwen2Config):
    """See `CompressoSlicedLlamaConfig`."""

    model_type = "compresso_sliced_qwen2"
    stream_width: int = 0
    head_width: int = 0


class CompressoSlicedQwen2ForCausalLM(SlicedLlamaForm, Qwen2ForCausalLM):
    config_class = CompressoSlicedQwen2Config
    layer_class = SlicedQwen2DecoderLayer


@strict
class CompressoSlicedQwen3Config(Qwen3Config):
    """See `CompressoSlicedLlamaConfig`."""

    model_type = "compresso_sliced_qwen3"
    stream_width: int = 0
    head_width: int = 0


class CompressoSlicedQwen3ForCausalLM(SlicedLlamaForm, Qwen3ForCausalLM):
    config_class = CompressoSlicedQwen3Config
    layer_class = SlicedQwen3DecoderLayer


@strict
class CompressoSlicedOPTConfig(OPTConfig):
    """See `CompressoSlicedLlamaConfig`."""

    model_type = "compresso_sliced_opt"
    stream_width: int = 0
    head_width: int = 0


class CompressoSlicedOPTForCausalLM(OPTForCausalLM):
    config_class = CompressoSlicedOPTConfig

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        width, _ = widths_of(config, 0)
        inner = self.model.decoder
        eps = inner.final_layer_norm.eps
        inner.embed_tokens = nn.Embedding(config.vocab_size, width, inner.embed_tokens.padding_idx)
        inner.embed_positions = OPTLearnedPositionalEmbedding(config.max_position_embeddings, width)
        inner.layers = nn.ModuleList(SlicedOPTDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        inner.final_layer_norm = SlicedNorm(config.hidden_size, eps)
        self.lm_head = nn.Linear(config.head_width, config.vocab_size)


@strict
class CompressoSlicedGPT2Config(GPT2Config):
    """See `CompressoSlicedLlamaConfig`."""

    model_type = "compresso_sliced_gpt2"
    stream_width: int = 0
    head_width: int = 0


class CompressoSlicedGPT2LMHeadModel(GPT2LMHeadModel):
    config_class = CompressoSlicedGPT2Config

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        width, _ = widths_of(config, 0)
        inner = self.transformer
        eps = inner.ln_f.eps
        inner.wte = nn.Embedding(config.vocab_size, width)
        inner.wpe = nn.Embedding(config.max_position_embeddings, width)
        inner.h = nn.ModuleList(SlicedGPT2Block(config, i) for i in range(config.num_hidden_layers))
        inner.ln_f = SlicedNorm(config.hidden_size, eps)
        self.lm_head = nn.Linear(config.head_width, config.vocab_size)
