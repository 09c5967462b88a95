"""Mixtures of experts as llama.cpp wants them: Mixtral in arch `llama`, Qwen3-MoE in `qwen3moe`, OLMoE in `olmoe`.

A file has one number of experts, one width and one number of heads for all layers, each with a mixture. Experts lie in
three tensors a layer, gate and up apart; the router stays in float32, as llama.cpp's own converter leaves it. Whether
the weights of the chosen are divided by their sum is known by heart there: in `llama` and `qwen3moe` they are, in
`olmoe` they are not.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from compresso.arch.base import LayerShape
from compresso.errors import ExportError
from compresso.formats.shrunk import Shrunk

MIXTURES = {"mixtral": "llama", "qwen3_moe": "qwen3moe", "olmoe": "olmoe"}
"""llama.cpp's names, by model type."""
ROUTER = "ffn_gate_inp"
_CURE = "Keep the folder of safetensors."


def describe_mixture(model: PreTrainedModel, shapes: Sequence[LayerShape]) -> Shrunk:
    """A live mixture for llama.cpp. Raises ExportError naming what that engine would compute otherwise."""
    config, arch = model.config, MIXTURES[model.config.model_type]
    _check_layers(shapes, arch)
    divides = bool(getattr(config, "norm_topk_prob", True))
    if divides != (arch != "olmoe"):
        theirs = "does not divide" if divides else "divides"
        raise ExportError(
            f"config.norm_topk_prob is {divides}, and llama.cpp's {arch} {theirs} the weights of the chosen experts by"
            f" their sum. {_CURE}"
        )
    if getattr(config, "clip_qkv", None) is not None:
        raise ExportError(f"config.clip_qkv is {config.clip_qkv}, and none is written to gguf. {_CURE}")
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise ExportError(f"config.sliding_window is {window}, and llama.cpp's {arch} attends to all. {_CURE}")
    first = shapes[0]
    if arch == "olmoe" and first.query_heads != first.kv_heads:
        raise ExportError(
            f"{first.query_heads} query heads share {first.kv_heads} key/value heads, and llama.cpp's olmoe has as"
            f" many of both. {_CURE}"
        )
    attention = model.get_submodule("model.layers.0.self_attn")
    head_dim = int(attention.head_dim)  # pyright: ignore[reportArgumentType]
    if arch == "olmoe" and first.query_heads * head_dim != config.hidden_size:
        raise ExportError(
            f"hidden_size is {config.hidden_size}, heads have {first.query_heads * head_dim} dimensions, and"
            f" llama.cpp's olmoe has as many of both. {_CURE}"
        )
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    if tied and arch != "olmoe":  # which wants a head of its own
        tensors.pop("lm_head.weight", None)
    norms = dict(attention.named_modules())
    return Shrunk(
        family=arch,
        config=config,
        tensors=tensors,
        shapes=tuple(shapes),
        head_dim=head_dim,
        eps=float(config.rms_norm_eps),
        head_eps=float(norms["q_norm"].variance_epsilon) if "q_norm" in norms else None,  # pyright: ignore[reportArgumentType]
        tied=tied and arch != "olmoe",
        kinds=None,
    )


def add_expert_fields(writer: Any, model: Shrunk, shape: LayerShape) -> None:
    """What llama.cpp has to know of a mixture. shape: as it is written."""
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(model.config.num_experts_per_tok)
    if model.family == "qwen3moe":
        writer.add_expert_feed_forward_length(shape.channels)


def expert_tensors(
    tensors: Mapping[str, Tensor], mixture: str, shape: LayerShape, hidden: int
) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """llama.cpp's name, written size and true tensor of a mixture's parameters.

    Args:
        tensors: the model's.
        mixture: full name of the mixture.
        shape: of the layer, as it is written: experts may be wider than they are.
        hidden: width of the stream.
    """
    gate, up = tensors[f"{mixture}.experts.gate_up_proj"].chunk(2, dim=1)
    experts, width = shape.experts, shape.channels
    yield ROUTER, (experts, hidden), tensors[f"{mixture}.gate.weight"]
    yield "ffn_gate_exps", (experts, width, hidden), gate
    yield "ffn_up_exps", (experts, width, hidden), up
    yield "ffn_down_exps", (experts, hidden, width), tensors[f"{mixture}.experts.down_proj"]


def _check_layers(shapes: Sequence[LayerShape], arch: str) -> None:
    """Raise ExportError naming the first layer that is not like the first."""
    for index, shape in enumerate(shapes):
        if not shape.experts or not shape.kv_heads:
            lacks = "attention" if shape.experts else "experts"
            raise ExportError(f"layers.{index} has no {lacks}, and llama.cpp's {arch} wants them in all. {_CURE}")
        for field, words in (("experts", "experts"), ("channels", "channels an expert"), ("kv_heads", "kv heads")):
            if (mine := getattr(shape, field)) != (wanted := getattr(shapes[0], field)):
                raise ExportError(
                    f"layers.{index} has {mine} {words}, layers.0 has {wanted}, and llama.cpp's {arch} reads one number"
                    " for all layers; so does every layout of ours: keep as many in each (drop_experts: pool: layer)."
                )
