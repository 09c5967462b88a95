"""The tensors of a GGUF file: names, sizes and rows as llama.cpp has them, made and written one at a time.

In `llama` and `deci` llama.cpp turns neighbouring pairs of a head's dimensions, transformers its two halves: rows of q
and k are reordered, by each layer's own number of heads. What a layer lacks of the written widths is filled with zeros.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from compresso.arch.base import LayerShape
from compresso.errors import NumericError
from compresso.formats.gguf_experts import ROUTER, expert_tensors
from compresso.formats.gguf_gemma import ARCHS, NORMS
from compresso.formats.shrunk import Shrunk

_ATTENTION = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
_FFN = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
_FFN_NORM = {"ffn_norm": "post_attention_layernorm"}
GEMMA = tuple(ARCHS.values())
ONE_WIDTH = ("qwen2", "qwen3", "qwen3moe", "olmoe", *GEMMA)
"""Families whose arch holds the same widths in every layer."""
_HEAD_NORMS = ("qwen3", "qwen3moe", "olmoe", "gemma3")
BIASED = ("q_proj", "k_proj", "v_proj")
Named = tuple[str, tuple[int, ...], Callable[[], Tensor]]


def rope_of(model: Shrunk) -> dict[str, Any]:
    """The rope parameters, `rope_type` and `rope_theta` among them; where kinds of layers have their own, of those that
    attend to all.
    """
    return dict(model.config.rope_parameters.get("full_attention", model.config.rope_parameters))


def tensors_of(model: Shrunk, written: Sequence[LayerShape], kept: Sequence[int]) -> Iterator[Named]:
    """Name, shape and maker of each tensor, in llama.cpp's order of rows and filled with zeros up to the written
    widths.
    """
    tensors, dim = model.tensors, model.head_dim
    hidden = tensors["model.embed_tokens.weight"].shape[1]

    def stored(name: str, source: str) -> Named:
        return name, tuple(tensors[source].shape), lambda: tensors[source]

    yield stored("token_embd.weight", "model.embed_tokens.weight")
    yield stored("output_norm.weight", "model.norm.weight")
    if not model.tied:
        yield stored("output.weight", "lm_head.weight")
    if rope_of(model)["rope_type"] == "llama3":
        factors = rope_factors(model)
        yield "rope_freqs.weight", tuple(factors.shape), lambda: factors
    for new, (index, shape) in enumerate(zip(kept, written, strict=True)):
        true = model.shapes[index]
        source = f"model.layers.{index}"
        if shape.query_heads:
            rows = {"q_proj": shape.query_heads, "k_proj": shape.kv_heads, "v_proj": shape.kv_heads}
            yield _norm(f"blk.{new}.attn_norm.weight", tensors.get(f"{source}.input_layernorm.weight"), hidden)
            for part, name in _ATTENTION.items():
                size = (rows[part] * dim, hidden) if part in rows else (hidden, shape.query_heads * dim)
                tensor = tensors[f"{source}.self_attn.{part}.weight"] if true.query_heads else None
                heads = rows[part] if part in ("q_proj", "k_proj") and model.family not in ONE_WIDTH else 0
                yield f"blk.{new}.{name}.weight", size, _maker(tensor, size, heads)
                if model.family == "qwen2" and part in BIASED:
                    yield (
                        f"blk.{new}.{name}.bias",
                        size[:1],
                        _maker(tensors.get(f"{source}.self_attn.{part}.bias"), size[:1]),
                    )
            for part in ("q", "k") if model.family in _HEAD_NORMS else ():
                width = dim * (shape.query_heads if model.family == "olmoe" else 1)
                yield _norm(
                    f"blk.{new}.attn_{part}_norm.weight", tensors.get(f"{source}.self_attn.{part}_norm.weight"), width
                )
        for name, norm in (NORMS if model.family in GEMMA else _FFN_NORM).items():
            if name != "attn_norm":
                yield _norm(f"blk.{new}.{name}.weight", tensors.get(f"{source}.{norm}.weight"), hidden)
        if true.experts:
            for name, size, tensor in expert_tensors(tensors, f"{source}.mlp", shape, hidden):
                yield f"blk.{new}.{name}.weight", size, _maker(tensor, size)
            continue
        for part, name in _FFN.items():
            size = (hidden, shape.channels) if part == "down_proj" else (shape.channels, hidden)
            tensor = tensors[f"{source}.mlp.{part}.weight"] if true.channels else None
            yield f"blk.{new}.{name}.weight", size, _maker(tensor, size)


def _norm(name: str, weight: Tensor | None, width: int) -> Named:
    """A norm's weight; ones for a sub-layer that is written as zeros."""
    return name, (width,), lambda: torch.ones(width) if weight is None else weight


def _maker(tensor: Tensor | None, size: tuple[int, ...], heads: int = 0) -> Callable[[], Tensor]:
    """Makes the tensor [size], zero where the model has nothing; of `heads` heads the two halves' rows come to
    alternate.
    """

    def make() -> Tensor:
        if tensor is None:
            return torch.zeros(size)
        if heads:
            return tensor.reshape(heads, 2, -1, size[1]).transpose(1, 2).reshape(size)
        if tuple(tensor.shape) == size:
            return tensor
        filled = tensor.new_zeros(size)
        filled[tuple(slice(extent) for extent in tensor.shape)] = tensor
        return filled

    return make


def rope_factors(model: Shrunk) -> Tensor:
    """What llama.cpp divides each plain rotary frequency [head_dim / 2] by,
    from transformers' own scaled frequencies.
    """
    exponents = torch.arange(0, model.head_dim, 2, dtype=torch.float32) / model.head_dim
    scaled, _ = ROPE_INIT_FUNCTIONS[rope_of(model)["rope_type"]](model.config, torch.device("cpu"))
    return rope_of(model)["rope_theta"] ** -exponents / scaled


def write_tensors(writer: Any, gguf: Any, tensors: Sequence[Named], dtype: str) -> None:
    """Write header and tensors, one in memory at a time."""
    types = gguf.GGMLQuantizationType
    head = "output.weight" if any(name == "output.weight" for name, _, _ in tensors) else "token_embd.weight"
    kinds = [
        types.F32
        if len(size) == 1 or f".{ROUTER}." in name
        else types.Q8_0
        if dtype == "q4_0" and name == head
        else types[dtype.upper()]
        for name, size, _ in tensors
    ]
    for (name, size, _), kind in zip(tensors, kinds, strict=True):
        as_bytes = gguf.quant_shape_to_byte_shape(size, kind)
        count = 1
        for extent in as_bytes:
            count *= extent
        writer.add_tensor_info(name, as_bytes, gguf.quants.np.dtype("uint8"), count, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for (name, _, make), kind in zip(tensors, kinds, strict=True):
        values = make().to("cpu", torch.float32).contiguous()
        if not bool(torch.isfinite(values).all()) or (
            kind == types.F16 and float(values.abs().max()) > torch.finfo(torch.float16).max
        ):
            raise NumericError(
                f"'{name}' holds values that are not finite in {kind.name.lower()}; write another --dtype."
            )
        writer.write_tensor_data(gguf.quants.quantize(values.numpy(), kind))
