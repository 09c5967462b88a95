"""The config of the model in a GGUF file.

llama.cpp knows some numbers of Gemmas by heart, and so must a reader: which layers slide, and the scale of attention
scores. Layers of different widths (arch `deci`, which compresso's own exports have) get the per-layer classes.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from compresso.arch.base import LayerShape
from compresso.checkpoint.gguf_fields import Fields
from compresso.checkpoint.gguf_rope import rope_parameters

_PERIOD = {"gemma2": 2, "gemma3": 6}
_BY_HIDDEN = {"gemma2": 46, "gemma3": 62}
"""Models of so many layers have scores scaled by hidden size over heads, not by a head's dimensions."""
_UNCAPPED = 1e6
"""A cap that changes nothing: arch `gemma2` has one always."""
_WINDOW, _LOCAL_THETA = 4096, 10_000.0
_CHANGES = (
    ("expert_count", "is a mixture of experts"),
    ("logit_scale", "scales its logits"),
    ("residual_scale", "scales what layers add"),
    ("embedding_scale", "scales its embeddings"),
    ("attention.scale", "scales attention scores by a number of its own"),
    ("attention.clamp_kqv", "clamps queries, keys and values"),
    ("attention.max_alibi_bias", "has ALiBi"),
)
"""Fields that change what is computed, in ways that the classes here do not have."""


def config_of(fields: Fields, factors: Tensor | None, dtype: str) -> tuple[dict[str, Any], list[LayerShape]]:
    """What config.json says of the model, and the widths of its layers.

    Args:
        fields: of the file.
        factors: its `rope_freqs.weight`, if there is one.
        dtype: of the weights once they are numbers.

    Raises:
        CheckpointError: for an architecture that is not read, or a field that is absent or makes no sense.
    """
    if fields.arch not in ARCHS:
        known = ", ".join(ARCHS)
        raise fields.refuse(f"holds the architecture '{fields.arch[:40]}'; read are {known}.")
    for key, what in _CHANGES:
        if fields.has(key) and fields.number(key):
            raise fields.refuse(f"{what} ({fields.arch}.{key}), which is not read. Give the folder it was made from.")
    layers, tensors = fields.integer("block_count"), fields.header.tensors
    if not 0 < layers <= len(tensors):
        raise fields.refuse(f"says that it has {layers} layers, and holds {len(tensors)} tensors.")
    shapes = _shapes(fields, layers)
    widths = ("query_heads", "kv_heads", "channels")
    top = LayerShape(*(max(1, *(getattr(one, part) for one in shapes)) for part in widths))
    hidden = fields.integer("embedding_length")
    head_dim = fields.integer("attention.key_length", hidden // top.query_heads)
    if not head_dim or fields.integer("attention.value_length", head_dim) != head_dim:
        raise fields.refuse("has keys and values of different sizes, or of none.")
    common: dict[str, Any] = {
        "dtype": dtype,
        "vocab_size": _rows(fields, hidden),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": top.query_heads,
        "num_key_value_heads": top.kv_heads,
        "intermediate_size": top.channels,
        "head_dim": head_dim,
        "max_position_embeddings": fields.integer("context_length"),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": rope_parameters(fields, head_dim, factors),
    }
    return ARCHS[fields.arch](fields, common, shapes), shapes


def _rows(fields: Fields, hidden: int) -> int:
    """Entries of the vocabulary, by the embedding itself."""
    embedding = fields.header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2 or embedding.shape[1] != hidden:
        found = "none" if embedding is None else str(list(embedding.shape))
        raise fields.refuse(f"says embedding_length {hidden}, and its token_embd.weight is {found}.")
    said = fields.integer("vocab_size", embedding.shape[0])
    if said != embedding.shape[0]:
        raise fields.refuse(f"says vocab_size {said}, and its token_embd.weight has {embedding.shape[0]} rows.")
    return said


def _shapes(fields: Fields, layers: int) -> list[LayerShape]:
    """Heads and channels of each layer."""
    heads = fields.of_layers("attention.head_count", layers)
    kv_heads = fields.of_layers("attention.head_count_kv", layers, heads)
    channels = fields.of_layers("feed_forward_length", layers)
    shapes = [LayerShape(*widths) for widths in zip(heads, kv_heads, channels, strict=True)]
    for index, shape in enumerate(shapes):
        if bool(shape.query_heads) != bool(shape.kv_heads) or (shape.kv_heads and shape.query_heads % shape.kv_heads):
            raise fields.refuse(
                f"has {shape.query_heads} heads for {shape.kv_heads} key/value heads in layer {index}, which is no"
                " attention that is read."
            )
    return shapes


def _llama(fields: Fields, common: dict[str, Any], shapes: list[LayerShape]) -> dict[str, Any]:
    tensors = fields.header.tensors
    biases = {
        "attention_bias": any(name.endswith(".attn_output.bias") for name in tensors),
        "mlp_bias": any(name.endswith(".ffn_down.bias") for name in tensors),
    }
    if _differ(shapes):
        return _per_layer("llama", common | biases, shapes)
    if common["hidden_size"] % common["num_attention_heads"]:  # which a stock Llama does not hold
        return _stock("mistral", "MistralForCausalLM", common | {"sliding_window": None})
    return _stock("llama", "LlamaForCausalLM", common | biases)


def _qwen(fields: Fields, common: dict[str, Any], shapes: list[LayerShape]) -> dict[str, Any]:
    own = {"use_sliding_window": False} | ({"attention_bias": False} if fields.arch == "qwen3" else {})
    if _differ(shapes):
        return _per_layer(fields.arch, common | own, shapes)
    return _stock(fields.arch, f"{fields.arch.capitalize()}ForCausalLM", common | own)


def _gemma(fields: Fields, common: dict[str, Any], shapes: list[LayerShape]) -> dict[str, Any]:
    _same(fields, shapes)
    own = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
    return _stock("gemma", "GemmaForCausalLM", common | own)


def _gemma_of_windows(fields: Fields, common: dict[str, Any], shapes: list[LayerShape]) -> dict[str, Any]:
    """Gemma 2 and the text model of Gemma 3."""
    _same(fields, shapes)
    arch, layers, heads = fields.arch, common["num_hidden_layers"], common["num_attention_heads"]
    by_hidden = layers == _BY_HIDDEN[arch]
    if by_hidden and common["hidden_size"] % heads:
        raise fields.refuse(f"has {heads} heads, which do not divide its hidden size {common['hidden_size']}.")
    caps = {name: fields.number(name, default) for name, default in _CAPS[arch].items()}
    own: dict[str, Any] = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": common["hidden_size"] // heads if by_hidden else common["head_dim"],
        "sliding_window": fields.integer("attention.sliding_window", _WINDOW if arch == "gemma2" else None),
        "layer_types": [
            "full_attention" if index % _PERIOD[arch] == _PERIOD[arch] - 1 else "sliding_attention"
            for index in range(layers)
        ],
        **{name: cap if 0 < cap < _UNCAPPED else None for name, cap in caps.items()},
    }
    if arch == "gemma2":
        return _stock("gemma2", "Gemma2ForCausalLM", common | own)
    local = {"rope_type": "default", "rope_theta": fields.number("rope.freq_base_swa", _LOCAL_THETA)}
    own["rope_parameters"] = {"full_attention": common["rope_parameters"], "sliding_attention": local}
    return _stock("gemma3_text", "Gemma3ForCausalLM", common | own)


_CAPS = {
    "gemma2": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3": {"attn_logit_softcapping": 0.0, "final_logit_softcapping": 0.0},
}
"""Caps of scores and logits, and what they are where the file says nothing."""


def _differ(shapes: list[LayerShape]) -> bool:
    """Whether a stock config cannot say the widths: they are not the same in all layers, or a part is absent."""
    return len(set(shapes)) > 1 or not (shapes[0].query_heads and shapes[0].channels)


def _same(fields: Fields, shapes: list[LayerShape]) -> None:
    """Raise CheckpointError if the layers of a family without a per-layer class differ, or lack a part."""
    if _differ(shapes):
        raise fields.refuse(f"has layers of different widths, and {fields.arch} is read with one width for all.")


def _stock(model_type: str, cls: str, values: dict[str, Any]) -> dict[str, Any]:
    return {"model_type": model_type, "architectures": [cls], **values}


def _per_layer(family: str, values: dict[str, Any], shapes: list[LayerShape]) -> dict[str, Any]:
    """The per-layer class of a family: the widest numbers for all, and in each layer what differs or is absent."""
    names = {"query_heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "channels": "intermediate_size"}
    layers: dict[str, dict[str, Any]] = {}
    for index, shape in enumerate(shapes):
        own = {key: getattr(shape, part) for part, key in names.items()}
        layer: dict[str, Any] = {key: width for key, width in own.items() if width not in (0, values[key])}
        skip = [part for part, gone in (("attention", not shape.kv_heads), ("mlp", not shape.channels)) if gone]
        if layer or skip:
            layers[str(index)] = layer | ({"skip": skip} if skip else {})
    return _stock(f"compresso_{family}", f"Compresso{family.capitalize()}ForCausalLM", values) | {
        "per_layer_config": layers
    }


ARCHS: dict[str, Callable[[Fields, dict[str, Any], list[LayerShape]], dict[str, Any]]] = {
    "llama": _llama,
    "deci": _llama,
    "qwen2": _qwen,
    "qwen3": _qwen,
    "gemma": _gemma,
    "gemma2": _gemma_of_windows,
    "gemma3": _gemma_of_windows,
}
"""Architectures that are read."""
