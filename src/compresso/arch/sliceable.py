"""Where a family reads and writes its residual stream, for a stream that is rotated and cut: embeddings, norms, the
linears behind and before them, and what is counted of a model whose stream is narrower (SliceGPT, arXiv 2401.15024).

What is wanted of a family: two halves a layer, each a norm that nothing but its linears read, then a linear whose
output is added to the stream. RMSNorm commutes with a rotation once its gain is in the linears behind it; LayerNorm
becomes RMSNorm once the mean is taken off whatever writes to the stream. Norms behind a sub-layer (Gemma), sub-layers
side by side (GPT-NeoX, Phi) and norms behind the sums (OPT-350m, BERT) are not of this form.
"""

import math
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.errors import ArchError


@dataclass(frozen=True, slots=True)
class Half:
    """An attention or an FFN, by names relative to its layer.

    Args:
        norm: what reads the stream.
        reads: the linears behind it.
        write: the linear whose output is added to the stream.
    """

    norm: str
    reads: tuple[str, ...]
    write: str


@dataclass(frozen=True, slots=True)
class Sliceable:
    """A family whose stream can be rotated and cut.

    Args:
        layers: where its layers lie.
        embeddings: whose sum is the stream before the first layer.
        attention, mlp: the halves of a layer.
        final_norm: what the head reads through.
        layer_norm: whether norms take the mean off and have a bias, else they are RMSNorms.
        whole_head: whether the head may read a stream of another width than the layers' (GPT-2's body reshapes what it
            hands on by what it began with).
    """

    layers: str
    embeddings: tuple[str, ...]
    attention: Half
    mlp: Half
    final_norm: str
    layer_norm: bool = False
    whole_head: bool = True

    @property
    def halves(self) -> tuple[Half, Half]:
        """Attention, then FFN."""
        return self.attention, self.mlp


_LLAMA = Sliceable(
    layers="model.layers",
    embeddings=("model.embed_tokens",),
    attention=Half("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj"),
    mlp=Half("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    final_norm="model.norm",
)
FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    "opt": Sliceable(
        layers="model.decoder.layers",
        embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        attention=Half(
            "self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.out_proj"
        ),
        mlp=Half("final_layer_norm", ("fc1",), "fc2"),
        final_norm="model.decoder.final_layer_norm",
        layer_norm=True,
    ),
    "gpt2": Sliceable(
        layers="transformer.h",
        embeddings=("transformer.wte", "transformer.wpe"),
        attention=Half("ln_1", ("attn.c_attn",), "attn.c_proj"),
        mlp=Half("ln_2", ("mlp.c_fc",), "mlp.c_proj"),
        final_norm="transformer.ln_f",
        layer_norm=True,
        whole_head=False,
    ),
}
"""By model type."""


@dataclass(frozen=True)
class Counts:
    """Of a model whose stream is sliced.

    Args:
        parameters: all of them; the head is one of its own.
        macs: multiply-accumulates a token, those of the head included.
        shortcuts: of both, what rotates the stream from half to half.
        head: parameters of the head.
    """

    parameters: int
    macs: int
    shortcuts: int
    head: int


def sliceable(model: PreTrainedModel, arch: Arch) -> Sliceable:
    """Where a model reads and writes its stream; from shapes alone.

    Raises ArchError: it is not of this file's form, or its layers differ in width.
    """
    config, kind = model.config, model.config.model_type
    found = FAMILIES.get(kind)
    if found is None:
        raise ArchError(
            f"the stream of a {kind} cannot be sliced: wanted norms that lie before one sub-layer each, of"
            f" {', '.join(FAMILIES)}. Take a method that removes units, or svd"
        )
    odd = ""
    if kind == "opt":
        if not config.do_layer_norm_before or config._remove_final_layer_norm:
            odd = "its norms lie behind the sums, or the last one is missing"
        elif config.word_embed_proj_dim != config.hidden_size:
            odd = f"its embeddings have word_embed_proj_dim={config.word_embed_proj_dim} and are projected"
        elif not (config.enable_bias and config.layer_norm_elementwise_affine):
            odd = "its linears have no biases, or its norms no gains"
    elif kind == "gpt2" and config.add_cross_attention:
        odd = "it has cross-attentions, which read the stream too"
    if not odd and any(shape != arch.shapes(model)[0] or not min_of(shape) for shape in arch.shapes(model)):
        odd = "its layers differ in width or lack a sub-layer; prune with layout: uniform, or drop whole layers"
    if odd:
        raise ArchError(f"the stream of this {kind} cannot be sliced: {odd}")
    return found


def min_of(shape: object) -> int:
    """The least width of a layer."""
    return min(getattr(shape, field) for field in ("query_heads", "kv_heads", "channels"))


def stream_width(model: PreTrainedModel, family: Sliceable) -> int:
    """Dimensions of the stream."""
    return model.get_parameter(f"{family.embeddings[0]}.weight").shape[1]


def sliced_counts(model: PreTrainedModel, family: Sliceable, width: int, head_width: int) -> Counts:
    """What a model has once its stream is sliced; from shapes alone.

    Args:
        model: dense.
        family: of it.
        width: of the sliced stream.
        head_width: of what the head reads.
    """
    dense, layers = stream_width(model, family), model.get_submodule(family.layers)
    assert isinstance(layers, nn.ModuleList)
    vocabulary = model.get_parameter("lm_head.weight").shape[0]
    parameters = sum(len(model.get_parameter(f"{name}.weight")) * width for name in family.embeddings)
    macs = shortcuts = 0
    for i, block in enumerate(layers):
        last = head_width if i == len(layers) - 1 else width
        norms = tuple(half.norm + "." for half in family.halves)
        written = {half.write: out for half, out in zip(family.halves, (width, last), strict=True)}
        read = {name for half in family.halves for name in half.reads}
        for name, parameter in block.named_parameters():
            module, _, tensor = name.rpartition(".")
            if name.startswith(norms):
                continue
            size = parameter.numel()
            if module in written:
                size = size // dense * written[module]
            elif module in read and tensor == "weight":
                size = size // dense * width
            parameters += size
            macs += size if parameter.dim() > 1 else 0
        shortcuts += width * width + width * last
    head = vocabulary * (head_width + family.layer_norm)
    return Counts(parameters + shortcuts + head, macs + shortcuts + vocabulary * head_width, shortcuts, head)


def dense_macs(model: PreTrainedModel, arch: Arch) -> int:
    """Multiply-accumulates a token of the dense model, those of the head included."""
    return sum(weight.macs * math.prod(weight.shape) for weight in arch.weights(model))
