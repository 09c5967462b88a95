"""Mixtral, Qwen2-MoE, Qwen3-MoE and OLMoE whose layers differ, for checkpoints that compresso pruned.

This one file is all that such a checkpoint needs beside its weights: it lies in the checkpoint too, so it imports
transformers, torch and huggingface_hub only. Each family is transformers' own, with the same parameter names and the
same arithmetic. Only construction differs: layer i reads its heads, its number of experts and the widths of its experts
or of its one FFN from `config.per_layer_config[i]`, under the family's own names, and leaves out what that entry's
`skip` names ("attention", "mlp": all of a mixture, its router and shared expert too), norm included. Every token takes
`num_experts_per_tok` experts in every layer that has some.

Unusual: files hold a tensor an expert, under the names of the family's published checkpoints, and transformers stacks
them while it reads. It does so by model type, so this file tells it once more for its own. And a layer without
attention owns no slot of the key/value cache: the k-th attention layer of a kind (full, sliding) owns the k-th slot of
that kind, because generation asks the first slot how long the text is.
"""
# The classes below are four times the same four, named; their mixins take their attributes from the family's classes.
# ruff: noqa: D101, RUF012
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOptionalCall=false, reportIndexIssue=false
# pyright: reportIncompatibleMethodOverride=false

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_utils import PreTrainedModel
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import (
    MixtralAttention,
    MixtralDecoderLayer,
    MixtralForCausalLM,
    MixtralModel,
    MixtralRMSNorm,
    MixtralRotaryEmbedding,
    MixtralSparseMoeBlock,
)
from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import (
    OlmoeAttention,
    OlmoeDecoderLayer,
    OlmoeForCausalLM,
    OlmoeModel,
    OlmoeRMSNorm,
    OlmoeRotaryEmbedding,
    OlmoeSparseMoeBlock,
)
from transformers.models.qwen2_moe.configuration_qwen2_moe import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import (
    Qwen2MoeAttention,
    Qwen2MoeDecoderLayer,
    Qwen2MoeForCausalLM,
    Qwen2MoeMLP,
    Qwen2MoeModel,
    Qwen2MoeRMSNorm,
    Qwen2MoeRotaryEmbedding,
    Qwen2MoeSparseMoeBlock,
)
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeAttention,
    Qwen3MoeDecoderLayer,
    Qwen3MoeForCausalLM,
    Qwen3MoeMLP,
    Qwen3MoeModel,
    Qwen3MoeRMSNorm,
    Qwen3MoeRotaryEmbedding,
    Qwen3MoeSparseMoeBlock,
)


def skipped(layer_config: PreTrainedConfig) -> list[str]:
    """The sub-layers that a layer's entry leaves out: some of "attention" and "mlp"."""
    return list(getattr(layer_config, "skip", ()))


def is_dense(config: PreTrainedConfig, layer: int) -> bool:
    """Whether a layer has one FFN where others have a mixture; Mixtral and OLMoE have no such layers."""
    if not hasattr(config, "mlp_only_layers"):
        return False
    return layer in config.mlp_only_layers or bool((layer + 1) % config.decoder_sparse_step)


def experts_of(config: PreTrainedConfig, layer: int) -> int:
    """How many experts a layer has; 0 for one without a mixture."""
    own = config.per_layer_config[layer]
    return 0 if "mlp" in skipped(own) or is_dense(config, layer) else int(getattr(own, config.experts_field))


def cache_slots(config: PreTrainedConfig) -> list[int | None]:
    """The slot of the key/value cache that each layer owns; None for a layer without attention."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    free = {kind: iter([slot for slot, other in enumerate(kinds) if other == kind]) for kind in set(kinds)}
    return [
        None if "attention" in skipped(own) else next(free[kind])
        for own, kind in zip(config.per_layer_config, kinds, strict=True)
    ]


class PerLayerMoeConfig:
    """What the four configs share. Decorated with `strict`, each validates these rules."""

    def validate_architecture(self) -> None:
        """Raise ValueError naming the layer that cannot be built. Heads need not divide the hidden size: head_dim is
        explicit.
        """
        layers = list(self.per_layer_config)
        counts = {0 if "attention" in skipped(own) else own.num_attention_heads for own in layers}
        if getattr(self, "head_dim", None) is None and (len(counts) > 1 or self.hidden_size % max(counts | {1})):
            raise ValueError("`head_dim` must be given: it does not follow from the hidden size once heads are pruned.")
        for index, own in enumerate(layers):
            if not set(skipped(own)) <= {"attention", "mlp"}:
                raise ValueError(f'Layer {index} skips {skipped(own)}; only "attention" and "mlp" can be skipped.')
            heads, kv_heads = own.num_attention_heads, own.num_key_value_heads
            if "attention" not in skipped(own) and (kv_heads < 1 or heads < 1 or heads % kv_heads):
                raise ValueError(
                    f"Layer {index} has {heads} attention heads for {kv_heads} key/value heads; wanted a multiple."
                )
            if "mlp" in skipped(own):
                continue
            if (width := getattr(own, "intermediate_size" if is_dense(self, index) else self.width_field)) < 1:
                raise ValueError(
                    f'Layer {index} has an FFN of width {width}; an absent one is written as skip: ["mlp"].'
                )
            if not is_dense(self, index) and (experts := experts_of(self, index)) < max(1, self.num_experts_per_tok):
                raise ValueError(
                    f"Layer {index} has {experts} experts, and a token takes {self.num_experts_per_tok}"
                    ' (num_experts_per_tok); an absent mixture is written as skip: ["mlp"].'
                )
        numbers = {experts_of(self, index) for index in range(len(layers))} - {0}
        if self.output_router_logits and len(numbers) != 1:
            raise ValueError(
                "`output_router_logits` wants as many experts in every mixture, for the loss that balances them; set it"
                " to false."
            )
        slots = [slot for slot in cache_slots(self) if slot is not None]
        if slots and 0 not in slots:
            raise ValueError(
                "Layer 0 has no attention; give it the `layer_types` entry of a layer that has, or the cache has no"
                " length."
            )


class PerLayerMoeDecoderLayer:
    """A decoder layer with the widths of its own entry; the family's attention, mixture, FFN (None without) and norm
    are in `parts`.
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        nn.Module.__init__(self)
        own = config.per_layer_config[layer_idx]
        attention, mixture, mlp, norm = self.parts
        self.hidden_size = config.hidden_size
        self.self_attn = self.mlp = self.input_layernorm = self.post_attention_layernorm = None
        if "attention" not in skipped(own):
            if getattr(own, "head_dim", None) is None:
                own.head_dim = own.hidden_size // own.num_attention_heads
            self.self_attn = attention(own, layer_idx)
            self.self_attn.layer_idx = cache_slots(config)[layer_idx]
            self.self_attn.config = config  # the shared one, so that set_attn_implementation reaches every layer
            if self.norms_span_heads:  # their width is that of all heads, which is not the stream's once that is pruned
                eps = config.rms_norm_eps
                self.self_attn.q_norm = norm(own.num_attention_heads * own.head_dim, eps=eps)
                self.self_attn.k_norm = norm(own.num_key_value_heads * own.head_dim, eps=eps)
            if getattr(config, "head_norm_eps", None) is not None:
                self.self_attn.q_norm.variance_epsilon = self.self_attn.k_norm.variance_epsilon = config.head_norm_eps
            self.input_layernorm = norm(config.hidden_size, eps=config.rms_norm_eps)
        if "mlp" not in skipped(own):
            if is_dense(config, layer_idx):
                self.mlp = mlp(own, intermediate_size=own.intermediate_size)
                self.mlp.config = config
            else:
                self.mlp = mixture(own)
                self.mlp.experts.config = config  # likewise, of the way in which experts are multiplied
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


class PerLayerMoeModel:
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
        self.post_init()


class PerLayerMoeForCausalLM:
    """Such a decoder with a language-model head. `num_experts` is the most of a layer; the loss that balances experts
    reads it.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.model = self.decoder_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts = max(experts_of(config, index) for index in range(config.num_hidden_layers))
        self.num_experts_per_tok = config.num_experts_per_tok
        self.post_init()


@strict
class CompressoMixtralConfig(PerLayerMoeConfig, MixtralConfig):
    model_type = "compresso_mixtral"
    experts_field = "num_local_experts"
    width_field = "intermediate_size"


class CompressoMixtralDecoderLayer(PerLayerMoeDecoderLayer, MixtralDecoderLayer):
    parts = (MixtralAttention, MixtralSparseMoeBlock, None, MixtralRMSNorm)
    norms_span_heads = False


class CompressoMixtralModel(PerLayerMoeModel, MixtralModel):
    config_class = CompressoMixtralConfig
    _no_split_modules = ["CompressoMixtralDecoderLayer"]
    parts = (CompressoMixtralDecoderLayer, MixtralRMSNorm, MixtralRotaryEmbedding)


class CompressoMixtralForCausalLM(PerLayerMoeForCausalLM, MixtralForCausalLM):
    config_class = CompressoMixtralConfig
    _no_split_modules = ["CompressoMixtralDecoderLayer"]
    decoder_class = CompressoMixtralModel


@strict
class CompressoQwen2MoeConfig(PerLayerMoeConfig, Qwen2MoeConfig):
    """`head_dim` is declared here, as Qwen2-MoE has none."""

    head_dim: int | None = None
    model_type = "compresso_qwen2_moe"
    experts_field = "num_experts"
    width_field = "moe_intermediate_size"


class CompressoQwen2MoeDecoderLayer(PerLayerMoeDecoderLayer, Qwen2MoeDecoderLayer):
    parts = (Qwen2MoeAttention, Qwen2MoeSparseMoeBlock, Qwen2MoeMLP, Qwen2MoeRMSNorm)
    norms_span_heads = False


class CompressoQwen2MoeModel(PerLayerMoeModel, Qwen2MoeModel):
    config_class = CompressoQwen2MoeConfig
    _no_split_modules = ["CompressoQwen2MoeDecoderLayer"]
    parts = (CompressoQwen2MoeDecoderLayer, Qwen2MoeRMSNorm, Qwen2MoeRotaryEmbedding)


class CompressoQwen2MoeForCausalLM(PerLayerMoeForCausalLM, Qwen2MoeForCausalLM):
    config_class = CompressoQwen2MoeConfig
    _no_split_modules = ["CompressoQwen2MoeDecoderLayer"]
    decoder_class = CompressoQwen2MoeModel


@strict
class CompressoQwen3MoeConfig(PerLayerMoeConfig, Qwen3MoeConfig):
    """`head_norm_eps`: epsilon of the q and k norms where pruning the hidden size changed that of the others; None:
    `rms_norm_eps`.
    """

    head_dim: int | None = None
    head_norm_eps: float | None = None
    model_type = "compresso_qwen3_moe"
    experts_field = "num_local_experts"
    width_field = "moe_intermediate_size"


class CompressoQwen3MoeDecoderLayer(PerLayerMoeDecoderLayer, Qwen3MoeDecoderLayer):
    parts = (Qwen3MoeAttention, Qwen3MoeSparseMoeBlock, Qwen3MoeMLP, Qwen3MoeRMSNorm)
    norms_span_heads = False


class CompressoQwen3MoeModel(PerLayerMoeModel, Qwen3MoeModel):
    config_class = CompressoQwen3MoeConfig
    _no_split_modules = ["CompressoQwen3MoeDecoderLayer"]
    parts = (CompressoQwen3MoeDecoderLayer, Qwen3MoeRMSNorm, Qwen3MoeRotaryEmbedding)


class CompressoQwen3MoeForCausalLM(PerLayerMoeForCausalLM, Qwen3MoeForCausalLM):
    config_class = CompressoQwen3MoeConfig
    _no_split_modules = ["CompressoQwen3MoeDecoderLayer"]
    decoder_class = CompressoQwen3MoeModel


@strict
class CompressoOlmoeConfig(PerLayerMoeConfig, OlmoeConfig):
    """`head_dim` is declared here, as OLMoE has none; `head_norm_eps` as for Qwen3-MoE."""

    head_dim: int | None = None
    head_norm_eps: float | None = None
    model_type = "compresso_olmoe"
    experts_field = "num_experts"
    width_field = "intermediate_size"


class CompressoOlmoeDecoderLayer(PerLayerMoeDecoderLayer, OlmoeDecoderLayer):
    parts = (OlmoeAttention, OlmoeSparseMoeBlock, None, OlmoeRMSNorm)
    norms_span_heads = True


class CompressoOlmoeModel(PerLayerMoeModel, OlmoeModel):
    config_class = CompressoOlmoeConfig
    _no_split_modules = ["CompressoOlmoeDecoderLayer"]
    parts = (CompressoOlmoeDecoderLayer, OlmoeRMSNorm, OlmoeRotaryEmbedding)


class CompressoOlmoeForCausalLM(PerLayerMoeForCausalLM, OlmoeForCausalLM):
    config_class = CompressoOlmoeConfig
    _no_split_modules = ["CompressoOlmoeDecoderLayer"]
    decoder_class = CompressoOlmoeModel


for _config in (CompressoMixtralConfig, CompressoQwen2MoeConfig, CompressoQwen3MoeConfig, CompressoOlmoeConfig):
    _stock = _config.model_type.removeprefix("compresso_")
    register_checkpoint_conversion_mapping(
        _config.model_type, get_checkpoint_conversion_mapping(_stock), overwrite=True
    )
