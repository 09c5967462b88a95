"""Gemma 2 and Gemma 3's text model as llama.cpp wants them: archs `gemma2` and `gemma3`, one width for all layers.

The norms multiply by 1 + weight, llama.cpp's by the weight, so the 1 is added here. That engine knows some numbers by
heart: which layers slide (every second, or five of six), the scale of attention scores (by a head's dimensions; in
models of 46 or 62 layers by hidden size over heads), and that Gemma 2 caps scores and logits. Another scale is folded
into the queries; what cannot be folded is refused.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from compresso.arch.base import LayerShape
from compresso.errors import ExportError
from compresso.formats.shrunk import Shrunk, check_against_tensors

ARCHS = {"gemma2": "gemma2", "gemma3_text": "gemma3"}
"""llama.cpp's names, by model type."""
NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PERIOD = {"gemma2": 2, "gemma3": 6}
"""The last of so many layers attends to all, the others to a window."""
_BY_HIDDEN = {"gemma2": 46, "gemma3": 62}
"""Models of so many layers have their scores scaled by hidden size over heads, not by a head's dimensions."""
_UNCAPPED = 1e6
"""A cap that changes nothing in float32: arch `gemma2` has one always."""
_CURE = "Keep the folder of safetensors, or write --format onnx."


def describe_gemma(model: PreTrainedModel, shapes: Sequence[LayerShape]) -> Shrunk:
    """A live Gemma with the 1 added to its norms and its scale of scores folded into its queries, for llama.cpp.

    Raises ExportError naming what that engine would compute otherwise.
    """
    arch, config = ARCHS[model.config.model_type], model.config
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        raise ExportError(f"the head is not tied to the embedding, and llama.cpp's {arch} ties them. {_CURE}")
    if getattr(config, "hidden_activation", None) not in ("gelu_pytorch_tanh", None):
        raise ExportError(
            f"config.hidden_activation is '{config.hidden_activation}', llama.cpp computes gelu_pytorch_tanh. {_CURE}"
        )
    if arch == "gemma3" and getattr(config, "final_logit_softcapping", None):
        raise ExportError(
            f"config.final_logit_softcapping is {config.final_logit_softcapping}, and llama.cpp's {arch} caps none."
            f" {_CURE}"
        )
    if getattr(config, "use_bidirectional_attention", None):
        raise ExportError(
            f"config.use_bidirectional_attention is set, and llama.cpp's {arch} attends to the past alone. {_CURE}"
        )
    described = Shrunk(
        family=arch,
        config=config,
        tensors=_folded(tensors, arch, _score_scale(config, arch, shapes)),
        shapes=tuple(shapes),
        head_dim=int(config.head_dim),
        eps=float(config.rms_norm_eps),
        head_eps=None,
        tied=True,
        kinds=_kinds(model, shapes),
    )
    check_against_tensors(described)
    _check_kinds(described)
    return described


def _kinds(model: PreTrainedModel, shapes: Sequence[LayerShape]) -> tuple[str, ...]:
    """What each layer attends to, by its live attention, for a config counts the layers that have one; "" for a layer
    without.
    """
    layers = list(model.get_decoder().layers)  # pyright: ignore[reportArgumentType]
    windows = [
        layer.self_attn.sliding_window if shape.query_heads else 0 for layer, shape in zip(layers, shapes, strict=True)
    ]
    return tuple(
        "" if window == 0 else "full_attention" if window is None else "sliding_attention" for window in windows
    )


def _score_scale(config: Any, arch: str, shapes: Sequence[LayerShape]) -> float:
    """What scores are to be multiplied by more than llama.cpp does."""
    heads = max((shape.query_heads for shape in shapes), default=0)
    theirs = config.hidden_size / max(heads, 1) if len(shapes) == _BY_HIDDEN[arch] else config.head_dim
    return math.sqrt(theirs / config.query_pre_attn_scalar)


def _folded(tensors: Mapping[str, Tensor], arch: str, scale: float) -> dict[str, Tensor]:
    """The tensors with whole norms, and the scale in the queries or in their norm."""
    folded = {name: tensor.float() + 1 if name.endswith("norm.weight") else tensor for name, tensor in tensors.items()}
    if scale != 1:
        part = ".q_norm.weight" if arch == "gemma3" else ".q_proj.weight"
        folded |= {name: tensor.float() * scale for name, tensor in folded.items() if name.endswith(part)}
    return folded


def _check_kinds(model: Shrunk) -> None:
    """Raise ExportError naming the first layer whose attention is not of the kind that llama.cpp takes it for."""
    period, config = _PERIOD[model.family], model.config
    same_either_way = model.family == "gemma2" and config.sliding_window >= config.max_position_embeddings
    for index, kind in enumerate(model.kinds if model.kinds and not same_either_way else ()):
        theirs = "full_attention" if index % period == period - 1 else "sliding_attention"
        if kind not in ("", theirs):
            raise ExportError(
                f"layers.{index} has {kind}, and llama.cpp's {model.family} computes {theirs} there. {_CURE}"
            )


def add_gemma_fields(writer: Any, model: Shrunk) -> None:
    """What llama.cpp has to know of a Gemma beside widths and tensors."""
    config = model.config
    writer.add_sliding_window(config.sliding_window)
    if model.family == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping or _UNCAPPED)
        writer.add_final_logit_softcapping(config.final_logit_softcapping or _UNCAPPED)
    else:
        local = config.rope_parameters["sliding_attention"]
        if local["rope_type"] != "default":
            raise ExportError(
                f"rope_parameters of sliding layers are {local}, and llama.cpp's {model.family} scales none. {_CURE}"
            )
        writer.add_rope_freq_base_swa(local["rope_theta"])
