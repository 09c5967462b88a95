"""Llama, Mistral, Qwen2 and Qwen3 whose layers differ in width, for checkpoints that compresso pruned.

This one file is all that such a checkpoint needs beside its weights: it lies in the checkpoint too, so it imports transformers, torch and
huggingface_hub only. Each family is transformers' own, with the same parameter names and the same arithmetic. Only construction differs:
layer i reads `num_attention_heads`, `num_key_value_heads` and `intermediate_size` from `config.per_layer_config[i]`, and leaves out what
that entry's `skip` names ("attention", "mlp"), norm included.

Unusual: a layer without attention owns no slot of the key/value cache. Generation asks the first slot how long the text is, so the slots
are handed to the layers that have attention, in order: the k-th attention layer of a kind (full, sliding) owns the k-th slot of that kind.
"""
# The classes below are four times the same four, named; their mixins take their attributes from the family's classes.
# ruff: noqa: D101, RUF012
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOptionalCall=false

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import (
    MistralAttention,
    MistralDecoderLayer,
    MistralForCausalLM,
    MistralMLP,
    MistralModel,
    MistralRMSNorm,
    MistralRotaryEmbedding,
)
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2DecoderLayer,
    Qwen2ForCausalLM,
    Qwen2MLP,
    Qwen2Model,
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
)
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3DecoderLayer,
    Qwen3ForCausalLM,
    Qwen3MLP,
    Qwen3Model,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
)


def skipped(layer_config: PreTrainedConfig) -> list[str]:
    """The sub-layers that a layer's entry leaves out: some of "attention" and "mlp"."""
    return list(getattr(layer_config, "skip", ()))


def cache_slots(config: PreTrainedConfig) -> list[int | None]:
    """The slot of the key/value cache that each layer owns; None for a layer without attention."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    free = {kind: iter([slot for slot, other in enumerate(kinds) if other == kind]) for kind in set(kinds)}
    return [None if "attention" in skipped(own) else next(free[kind]) for own, kind in zip(config.per_layer_config, kinds, strict=True)]


class PerLayerConfig:
    """What the four configs share. Decorated with `strict`, each validates these rules instead of its family's."""

    def validate_architecture(self) -> None:
        """Raise ValueError naming the layer whose widths cannot be built. Heads need not divide the hidden size: head_dim is explicit."""
        layers = list(self.per_layer_config)
        counts = {0 if "attention" in skipped(own) else own.num_attention_heads for own in layers}
        # a config of defaults, which older versions of transformers build to compare with, has none and needs none
        if getattr(self, "head_dim", None) is None and (len(counts) > 1 or self.hidden_size % max(counts | {1})):
            raise ValueError("`head_dim` must be given: it does not follow from the hidden size once heads are pruned.")
        for index, own in enumerate(layers):
            if not set(skipped(own)) <= {"attention", "mlp"}:
                raise ValueError(f'Layer {index} skips {skipped(own)}; only "attention" and "mlp" can be skipped.')
            heads, kv_heads = own.num_attention_heads, own.num_key_value_heads
            if "attention" not in skipped(own) and (kv_heads < 1 or heads < 1 or heads % kv_heads):
                raise ValueError(f"Layer {index} has {heads} attention heads for {kv_heads} key/value heads; wanted a multiple.")
            if "mlp" not in skipped(own) and own.intermediate_size < 1:
                raise ValueError(f'Layer {index} has intermediate_size {own.intermediate_size}; an absent FFN is written as skip: ["mlp"].')
        slots = [slot for slot in cache_slots(self) if slot is not None]
        if slots and 0 not in slots:
            raise ValueError("Layer 0 has no attention; give it the `layer_types` entry of a layer that has, or the cache has no length.")


class PerLayerDecoderLayer:
    """A decoder layer with the widths of its own entry; `attention, mlp, norm` of the family are in `parts`."""

    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        nn.Module.__init__(self)
        own = config.per_layer_config[layer_idx]
        attention, mlp, norm = self.parts
        self.hidden_size = config.hidden_size
        self.self_attn = self.mlp = self.input_layernorm = self.post_attention_layernorm = None
        if "attention" not in skipped(own):
            self.self_attn = attention(config=own, layer_idx=layer_idx)
            self.self_attn.layer_idx = cache_slots(config)[layer_idx]
            self.self_attn.config = config  # the shared one, so that set_attn_implementation reaches every layer
            if getattr(config, "head_norm_eps", None) is not None:
                self.self_attn.q_norm.variance_epsilon = self.self_attn.k_norm.variance_epsilon = config.head_norm_eps
            self.input_layernorm = norm(config.hidden_size, eps=config.rms_norm_eps)
        if "mlp" not in skipped(own):
            self.mlp = mlp(own)
            self.mlp.config = config
            self.post_attention_layernorm = norm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs,
    ) -> torch.Tensor:
        if self.self_attn is not None:
            attended, _ = self.self_attn(
                hidden_states=self.input_layernorm(hidden_states),
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
            hidden_states = hidden_states + attended
        if self.mlp is not None:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


class PerLayerModel:
    """A decoder of such layers; the family's `layer`, `norm` and `rotary` classes are in `parts`."""

    def __init__(self, config: PreTrainedConfig) -> None:
        PreTrainedModel.__init__(self, config)
        layer, norm, rotary = self.parts
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([layer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = norm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = rotary(config=config)
        self.gradient_checkpointing = False
        self.has_sliding_layers = "sliding_attention" in (getattr(config, "layer_types", None) or ())
        self.post_init()


class PerLayerForCausalLM:
    """Such a decoder with a language-model head."""

    def __init__(self, config: PreTrainedConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.model = self.decoder_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


@strict
class CompressoLlamaConfig(PerLayerConfig, LlamaConfig):
    model_type = "compresso_llama"


class CompressoLlamaDecoderLayer(PerLayerDecoderLayer, LlamaDecoderLayer):
    parts = (LlamaAttention, LlamaMLP, LlamaRMSNorm)


class CompressoLlamaModel(PerLayerModel, LlamaModel):
    config_class = CompressoLlamaConfig
    _no_split_modules = ["CompressoLlamaDecoderLayer"]
    parts = (CompressoLlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding)


class CompressoLlamaForCausalLM(PerLayerForCausalLM, LlamaForCausalLM):
    config_class = CompressoLlamaConfig
    _no_split_modules = ["CompressoLlamaDecoderLayer"]
    decoder_class = CompressoLlamaModel


@strict
class CompressoMistralConfig(PerLayerConfig, MistralConfig):
    model_type = "compresso_mistral"


class CompressoMistralDecoderLayer(PerLayerDecoderLayer, MistralDecoderLayer):
    parts = (MistralAttention, MistralMLP, MistralRMSNorm)


class CompressoMistralModel(PerLayerModel, MistralModel):
    config_class = CompressoMistralConfig
    _no_split_modules = ["CompressoMistralDecoderLayer"]
    parts = (CompressoMistralDecoderLayer, MistralRMSNorm, MistralRotaryEmbedding)


class CompressoMistralForCausalLM(PerLayerForCausalLM, MistralForCausalLM):
    config_class = CompressoMistralConfig
    _no_split_modules = ["CompressoMistralDecoderLayer"]
    decoder_class = CompressoMistralModel


@strict
class CompressoQwen2Config(PerLayerConfig, Qwen2Config):
    """`head_dim` is declared here: Qwen2 has none, and older versions of transformers set what is not declared after they validate."""

    head_dim: int | None = None
    model_type = "compresso_qwen2"


class CompressoQwen2DecoderLayer(PerLayerDecoderLayer, Qwen2DecoderLayer):
    parts = (Qwen2Attention, Qwen2MLP, Qwen2RMSNorm)


class CompressoQwen2Model(PerLayerModel, Qwen2Model):
    config_class = CompressoQwen2Config
    _no_split_modules = ["CompressoQwen2DecoderLayer"]
    parts = (CompressoQwen2DecoderLayer, Qwen2RMSNorm, Qwen2RotaryEmbedding)


class CompressoQwen2ForCausalLM(PerLayerForCausalLM, Qwen2ForCausalLM):
    config_class = CompressoQwen2Config
    _no_split_modules = ["CompressoQwen2DecoderLayer"]
    decoder_class = CompressoQwen2Model


@strict
class CompressoQwen3Config(PerLayerConfig, Qwen3Config):
    """`head_norm_eps`: epsilon of the q and k norms where pruning the hidden size changed that of the others; None: `rms_norm_eps`."""

    model_type = "compresso_qwen3"
    head_norm_eps: float | None = None


class CompressoQwen3DecoderLayer(PerLayerDecoderLayer, Qwen3DecoderLayer):
    parts = (Qwen3Attention, Qwen3MLP, Qwen3RMSNorm)


class CompressoQwen3Model(PerLayerModel, Qwen3Model):
    config_class = CompressoQwen3Config
    _no_split_modules = ["CompressoQwen3DecoderLayer"]
    parts = (CompressoQwen3DecoderLayer, Qwen3RMSNorm, Qwen3RotaryEmbedding)


class CompressoQwen3ForCausalLM(PerLayerForCausalLM, Qwen3ForCausalLM):
    config_class = CompressoQwen3Config
    _no_split_modules = ["CompressoQwen3DecoderLayer"]
    decoder_class = CompressoQwen3Model
