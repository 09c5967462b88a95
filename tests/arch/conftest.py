"""Tiny decoders with weights large enough that logits are O(1): a wrong fold must not hide below a tolerance."""

import copy
import functools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    BloomConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForQuestionAnswering,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    Glm4MoeConfig,
    GlmConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from compresso.arch.stream import is_norm

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 176,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-2,  # large, so that an eps that was not rescaled shows
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
ENCODER = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 176,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
BERT = {**ENCODER, "vocab_size": 128, "max_position_embeddings": 64}
DISTILBERT = {"dim": 64, "n_layers": 4, "n_heads": 4, "hidden_dim": 176, "dropout": 0.0, "attention_dropout": 0.0}
DISTILBERT |= {"vocab_size": 128, "max_position_embeddings": 64}
VIT = {**ENCODER, "image_size": 16, "patch_size": 4}
OPT_SIZES = {
    **{
        key: SIZES[key]
        for key in ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings", "pad_token_id")
    },
    "num_attention_heads": 4,
    "ffn_dim": 176,
    "dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GPT2 = {
    "n_embd": 64,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GPT2 |= {"pad_token_id": 0, "n_inner": 176, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
NEOX = {key: value for key, value in SIZES.items() if key != "rms_norm_eps"} | {"num_attention_heads": 4}
PHI3 = {**SIZES, "num_attention_heads": 8, "sliding_window": None}
GEMMA = {
    **SIZES,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "query_pre_attn_scalar": 20,
    "sliding_window": 5,
}
BLOOM = {key: SIZES[key] for key in ("hidden_size", "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
BLOOM |= {"n_layer": 4, "n_head": 4}
GLM = {**SIZES, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 12}
MOE = {**SIZES, "num_attention_heads": 8, "num_key_value_heads": 2, "num_experts_per_tok": 2}
SMALL_EXPERTS = {**MOE, "moe_intermediate_size": 40}
GROUPED_ROUTER = {**SMALL_EXPERTS, "n_routed_experts": 12, "first_k_dense_replace": 2, "routed_scaling_factor": 1.3}
MLA = {"q_lora_rank": 24, "kv_lora_rank": 20, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 16}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def _without_end(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same without the end tokens that its class names, which a small vocabulary has not."""
    config.eos_token_id = None
    return config


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama_mha": lambda: LlamaConfig(**SIZES, num_attention_heads=4),
    "llama_gqa_tied": lambda: LlamaConfig(
        **SIZES, num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True
    ),
    "llama_gqa": lambda: LlamaConfig(**SIZES, num_attention_heads=8, num_key_value_heads=2),
    "llama_biased": lambda: LlamaConfig(
        **SIZES, num_attention_heads=8, num_key_value_heads=4, attention_bias=True, mlp_bias=True
    ),
    "mistral": lambda: MistralConfig(**SIZES, num_attention_heads=8, num_key_value_heads=4, sliding_window=5),
    "qwen2": lambda: Qwen2Config(
        **SIZES,
        num_attention_heads=4,
        num_key_value_heads=4,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=2,
    ),
    "qwen2_gqa": lambda: Qwen2Config(**SIZES, num_attention_heads=8, num_key_value_heads=2),
    "qwen3": lambda: Qwen3Config(
        **SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=24, tie_word_embeddings=True
    ),
    "opt": lambda: OPTConfig(**OPT_SIZES, word_embed_proj_dim=64),
    "opt_unbiased": lambda: OPTConfig(
        **OPT_SIZES, word_embed_proj_dim=64, enable_bias=False, tie_word_embeddings=False
    ),
    "opt_post_norm": lambda: OPTConfig(**OPT_SIZES, word_embed_proj_dim=32, do_layer_norm_before=False),
    "gpt2": lambda: GPT2Config(**GPT2),
    "gpt_neox": lambda: GPTNeoXConfig(**NEOX),
    "gpt_neox_unbiased": lambda: GPTNeoXConfig(**NEOX, attention_bias=False, use_parallel_residual=False),
    "phi3": lambda: Phi3Config(**PHI3, num_key_value_heads=4),
    "phi3_gqa_tied": lambda: Phi3Config(**PHI3, num_key_value_heads=2, tie_word_embeddings=True),
    "glm": lambda: _without_end(GlmConfig(**GLM)),
    "glm4_tied": lambda: _without_end(Glm4Config(**GLM, tie_word_embeddings=True, attention_bias=False)),
    "bloom": lambda: BloomConfig(**BLOOM),
    "bloom_post_norm": lambda: BloomConfig(
        **BLOOM, apply_residual_connection_post_layernorm=True, tie_word_embeddings=False
    ),
    "phi": lambda: PhiConfig(**NEOX),
    "phi_gqa_normed": lambda: PhiConfig(**NEOX | {"num_attention_heads": 8}, num_key_value_heads=4, qk_layernorm=True),
    "bert": lambda: BertConfig(**BERT),
    "bert_classifier": lambda: BertConfig(**BERT, num_labels=3),
    "bert_bare": lambda: BertConfig(**BERT),
    "roberta": lambda: RobertaConfig(**BERT, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    "roberta_classifier": lambda: RobertaConfig(**BERT, pad_token_id=0, num_labels=3),
    "distilbert": lambda: DistilBertConfig(**DISTILBERT),
    "distilbert_finder": lambda: DistilBertConfig(**DISTILBERT, qa_dropout=0.0),
    "vit": lambda: ViTConfig(**VIT, num_labels=5),
    "vit_bare": lambda: ViTConfig(**VIT, qkv_bias=False),
    "gemma2": lambda: Gemma2Config(**GEMMA, layer_types=MIXED, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3": lambda: Gemma3TextConfig(**GEMMA, layer_types=MIXED),
    "moe_mixtral": lambda: MixtralConfig(**MOE, num_local_experts=6, sliding_window=5),
    "moe_olmoe": lambda: OlmoeConfig(**{**MOE, "num_key_value_heads": 8}, num_experts=8),
    "moe_qwen3_tied": lambda: Qwen3MoeConfig(
        **SMALL_EXPERTS, num_experts=8, head_dim=12, mlp_only_layers=[2], norm_topk_prob=True, tie_word_embeddings=True
    ),
    "moe_qwen2": lambda: Qwen2MoeConfig(
        **SMALL_EXPERTS, num_experts=8, shared_expert_intermediate_size=56, mlp_only_layers=[1, 2]
    ),
    "moe_deepseek": lambda: DeepseekV3Config(
        **{**GROUPED_ROUTER, "num_key_value_heads": 8}, **MLA, n_group=3, topk_group=2, norm_topk_prob=False
    ),
    "moe_deepseek_v2": lambda: DeepseekV2Config(
        **{**GROUPED_ROUTER, "num_key_value_heads": 8},
        **MLA,
        n_group=3,
        topk_group=2,
        topk_method="group_limited_greedy",
    ),
    "moe_deepseek_v2_greedy": lambda: DeepseekV2Config(  # as V2-Lite: groups are named, and do not limit
        **{**GROUPED_ROUTER, "num_key_value_heads": 8, "routed_scaling_factor": 1.0},
        **{**MLA, "q_lora_rank": None},
        n_group=3,
        topk_group=1,
        attention_bias=True,
    ),
    "moe_glm4": lambda: Glm4MoeConfig(**GROUPED_ROUTER, use_qk_norm=True, head_dim=12, attention_bias=True),
    "moe_gpt_oss": lambda: GptOssConfig(**MOE, num_local_experts=6, head_dim=12, sliding_window=5),
}
CLASSES: dict[str, type[PreTrainedModel]] = {
    "bert": BertForMaskedLM,
    "bert_classifier": BertForSequenceClassification,
    "bert_bare": BertModel,
    "roberta": RobertaForMaskedLM,
    "roberta_classifier": RobertaForSequenceClassification,
    "distilbert": DistilBertForMaskedLM,
    "distilbert_finder": DistilBertForQuestionAnswering,
    "vit": ViTForImageClassification,
    "vit_bare": ViTModel,
}
"""Models that are not causal language models."""
MIXTURES = [name for name in CONFIGS if name.startswith("moe_")]
"""Models with experts."""
WITH_HIDDEN = [name for name in CONFIGS if name.startswith(("llama", "mistral", "qwen", "phi3", "glm"))]
ENCODERS_WITH_HIDDEN = [name for name in CONFIGS if name.startswith(("bert", "roberta", "distilbert"))]
GROUPED = [
    "llama_gqa_tied",
    "llama_gqa",
    "llama_biased",
    "mistral",
    "qwen2_gqa",
    "qwen3",
    "phi3",
    "phi3_gqa_tied",
    "gemma2",
    "gemma3",
    "glm",
    "glm4_tied",
    "phi_gqa_normed",
    "moe_mixtral",
    "moe_qwen3_tied",
    "moe_qwen2",
    "moe_glm4",
]
"""Models whose query heads share key/value heads."""
POST_NORM = [
    name for name in CONFIGS if name.startswith(("bert", "roberta", "distilbert")) or name.endswith("_post_norm")
]
"""Models whose norms feed the residual sums or lie behind them, so that they cannot be dropped whole by masks."""
ALL_HEADS = [name for name in CONFIGS if name.startswith(("bloom", "moe_olmoe", "moe_deepseek", "moe_gpt_oss"))]
"""Models whose heads all stay."""


def build(name: str, attention: str = "sdpa") -> PreTrainedModel:
    """A model from its config, with its class's own random weights."""
    if name in ("gemma2", "moe_gpt_oss") or name.startswith("bloom"):
        attention = "eager"  # soft-capped scores, sinks and ALiBi have no other
    if name in CLASSES:
        return CLASSES[name]._from_config(CONFIGS[name](), attn_implementation=attention)
    experts = {"experts_implementation": "eager"} if name in MIXTURES else {}  # whose products torch counts
    return AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation=attention, **experts)


@functools.cache
def _original(name: str) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(len(name))
    model = build(name).eval()
    tied = getattr(model.config, "tie_word_embeddings", False)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if is_norm(parameter_name.rpartition(".")[0]) and parameter_name.endswith("weight"):
                centre = 0 if name.startswith("gemma") else 1
                parameter.copy_(torch.empty_like(parameter).uniform_(centre - 0.5, centre + 0.5, generator=generator))
            elif parameter_name.endswith("bias"):
                parameter.normal_(0, 0.3, generator=generator)
            else:
                scale = (
                    (0.1 if tied else 0.7)
                    if "embed" in parameter_name or ".wte" in parameter_name or ".wpe" in parameter_name
                    else 1 / math.sqrt(parameter.shape[1] if parameter.dim() == 3 else parameter[0].numel())
                )
                parameter.normal_(0, scale, generator=generator)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("correction_bias"):
                buffer.uniform_(-0.2, 0.2, generator=generator)
    return model


@pytest.fixture
def tiny() -> Callable[[str], PreTrainedModel]:
    """A fresh copy of the named tiny model in float32."""
    return lambda name: copy.deepcopy(_original(name))


@pytest.fixture
def double_norms(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets RMSNorms compute in their input's dtype; the stock ones always go through float32, which would hide errors
    below 1e-7.
    """

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    def one_plus(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return (1 + self.weight) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))

    for norm in {
        type(m) for name in CONFIGS for m in _original(name).modules() if type(m).__name__.endswith("RMSNorm")
    }:
        monkeypatch.setattr(norm, "forward", one_plus if norm.__name__.startswith("Gemma") else forward)
    softmax = nn.functional.softmax
    monkeypatch.setattr(
        nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim)
    )  # eager attention asks for float32
    method_softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda x, dim, dtype=None: method_softmax(x, dim=dim))
    for method in ("float", "type"):  # so do routers
        narrow = getattr(torch.Tensor, method)
        monkeypatch.setattr(
            torch.Tensor, method, lambda x, *of, narrow=narrow: x if x.dtype == torch.float64 else narrow(x, *of)
        )
    yield
