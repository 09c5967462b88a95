"""Which config holds a shrunk model, if any does: one width for all layers, all padded to the widest, or each layer its
own.
"""

import math
from dataclasses import replace
from typing import Any, Literal

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig

from compresso.arch.base import LayerShape
from compresso.formats.shrunk import Shrunk
from compresso.native import CLASSES, per_layer_auto_map

Layout = Literal["uniform", "padded", "native"]
REBUILT = (
    "model_type",
    "architectures",
    "auto_map",
    "per_layer_config",
    "skip",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
)
"""Fields of a model's config that a layout says anew."""
_FIELDS = {"query_heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "channels": "intermediate_size"}


def uniform_obstacle(model: Shrunk) -> str | None:
    """Why one width for all layers cannot hold this model: the first layer and field that differ; None if it can."""
    first = model.shapes[0]
    for index, shape in enumerate(model.shapes):
        for name in _FIELDS:
            mine, wanted = getattr(shape, name), getattr(first, name)
            if mine == 0:
                return f"layers.{index} has no {name.replace('_', ' ')}"
            if mine != wanted:
                return f"layers.{index} has {mine} {name.replace('_', ' ')}, layers.0 has {wanted}"
    return stock_obstacle(model, first)


def stock_obstacle(model: Shrunk, shape: LayerShape) -> str | None:
    """Why no config class of transformers holds this model even with the same width everywhere; None if one does."""
    if _stock_family(model, shape) is None:
        hidden = _hidden(model)
        return (
            f"{shape.query_heads} query heads do not divide the hidden size {hidden}, and Mistral, which allows that,"
            " has no biases"
        )
    if _eps_scale(model) != 1 and any(
        tensor.dtype in (torch.float16, torch.bfloat16) for tensor in model.tensors.values()
    ):
        return (
            f"q and k norms have epsilon {model.head_eps:g}, the others {model.eps:g}; 16-bit weights cannot absorb the"
            " difference"
        )
    return None


def widest(model: Shrunk) -> LayerShape:
    """The width that every layer fits into: most groups, most query heads a group, most channels;
    at least one of each.
    """
    kv_heads = max([1, *(shape.kv_heads for shape in model.shapes)])
    group = max([1, *(shape.query_heads // shape.kv_heads for shape in model.shapes if shape.kv_heads)])
    return LayerShape(kv_heads * group, kv_heads, max([1, *(shape.channels for shape in model.shapes)]))


def stock_config(model: Shrunk, shape: LayerShape) -> PreTrainedConfig:
    """A plain transformers config with this width everywhere; Mistral's for a Llama whose heads do not divide the
    hidden size.
    """
    family = _stock_family(model, shape)
    assert family is not None, "callers ask stock_obstacle first"
    fields = _common_fields(model) | {key: getattr(shape, name) for name, key in _FIELDS.items()}
    if model.head_eps is not None:
        fields["rms_norm_eps"] = model.head_eps
    if family != model.family:
        fields = {
            key: value for key, value in fields.items() if key not in ("attention_bias", "mlp_bias", "pretraining_tp")
        }
        fields["sliding_window"] = None
    config = CONFIG_MAPPING[family](**fields)
    config.architectures = [f"{family.capitalize()}ForCausalLM"]
    return config


def native_config(model: Shrunk) -> PreTrainedConfig:
    """Our config class: the widest layer's numbers globally, each layer's differences and absent sub-layers in
    `per_layer_config`.
    """
    with_attention = [shape for shape in model.shapes if shape.kv_heads]
    top = LayerShape(
        max((shape.query_heads for shape in with_attention), default=1),
        max((shape.kv_heads for shape in with_attention), default=1),
        max(1, *(shape.channels for shape in model.shapes)),
    )
    layers: dict[int, dict[str, Any]] = {}
    for index, shape in enumerate(model.shapes):
        own = {
            key: getattr(shape, name)
            for name, key in _FIELDS.items()
            if getattr(shape, name) not in (0, getattr(top, name))
        }
        skip = [part for part, absent in (("attention", shape.kv_heads == 0), ("mlp", shape.channels == 0)) if absent]
        if own or skip:
            layers[index] = own | ({"skip": skip} if skip else {})
    fields = _common_fields(model) | {key: getattr(top, name) for name, key in _FIELDS.items()}
    if model.kinds is not None:
        kinds = list(model.kinds)
        if (
            model.shapes[0].kv_heads == 0 and with_attention
        ):  # layer 0's kind is free, and its cache slot must be someone's
            kinds[0] = next(kind for kind, shape in zip(kinds, model.shapes, strict=True) if shape.kv_heads)
        fields["layer_types"] = kinds
    if model.head_eps not in (None, model.eps):
        fields["head_norm_eps"] = model.head_eps
    config_class, _, language_model = CLASSES[model.family]
    config = config_class(**fields, **({"per_layer_config": layers} if layers else {}))
    config.architectures = [language_model.__name__]
    config.auto_map = per_layer_auto_map(config.model_type)
    return config


def with_one_epsilon(model: Shrunk) -> Shrunk:
    """The same function with all norms at the q and k norms' epsilon, by rescaling the residual stream; exact but for
    rounding.

    norm(s x; s^2 eps) = norm(x; eps), so everything that writes into the stream is multiplied by s = sqrt(head_eps /
    eps). A head tied to the embedding is multiplied too, which the final norm's weight takes back.
    """
    scale = _eps_scale(model)
    if scale == 1:
        return model
    tensors = dict(model.tensors)
    for name, tensor in model.tensors.items():
        if name.startswith("model.embed_tokens.") or ".o_proj." in name or ".down_proj" in name:
            tensors[name] = (tensor.double() * scale).to(tensor.dtype)
        elif name == "model.norm.weight" and model.tied:
            tensors[name] = (tensor.double() / scale).to(tensor.dtype)
    return replace(model, tensors=tensors, eps=model.head_eps if model.head_eps is not None else model.eps)


def _common_fields(model: Shrunk) -> dict[str, Any]:
    """Config fields that do not depend on the layout; what the model's config says beyond widths (rope, activation,
    token ids) is kept.
    """
    fields = {
        key: value
        for key, value in model.config.to_dict().items()
        if key not in (*REBUILT, "head_norm_eps", *_FIELDS.values())
    }
    fields |= {
        "vocab_size": model.tensors["model.embed_tokens.weight"].shape[0],
        "hidden_size": _hidden(model),
        "num_hidden_layers": len(model.shapes),
        "head_dim": model.head_dim,
        "rms_norm_eps": model.eps,
        "tie_word_embeddings": model.tied,
    }
    if model.kinds is not None:
        fields["layer_types"] = list(model.kinds)
    for key, part in (("attention_bias", "q_proj"), ("mlp_bias", "gate_proj")):
        if key in fields:
            fields[key] = any(name.endswith(f"{part}.bias") for name in model.tensors)
    return fields


def _stock_family(model: Shrunk, shape: LayerShape) -> str | None:
    """The family whose stock config accepts these numbers. Llama's insists that heads divide the hidden size."""
    if model.family != "llama" or _hidden(model) % shape.query_heads == 0:
        return model.family
    return None if any(name.endswith(".bias") for name in model.tensors) else "mistral"


def _eps_scale(model: Shrunk) -> float:
    return 1.0 if model.head_eps is None else math.sqrt(model.head_eps / model.eps)


def _hidden(model: Shrunk) -> int:
    return model.tensors["model.embed_tokens.weight"].shape[1]
