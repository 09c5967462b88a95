"""The pre-norm decoder that Llama, Mistral, Qwen2 and Qwen3 share, described once; their files state what differs.

    embed_tokens -> [ + o(attention(q, k, v of norm)), + down(act(gate) * up of norm) ] x layers -> norm -> lm_head

Masks apply where Compresso (arXiv 2310.05015) puts them: heads before `o_proj`, FFN channels on `gate_proj` and
`up_proj` before the activation, hidden dimensions on the embedding's output and on both sub-layers' outputs; norms keep
dividing by the original width. A unit of a head axis is one key/value head with the query heads that share it, so
grouped-query attention stays grouped. A bias on `o_proj` (or `down_proj`) outlives the last head (or channel); such an
axis must keep one unit, while removing the whole sub-layer through the axes `attention`, `mlp` or `layers` removes the
bias too and stays exact.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from compresso.arch.absent import NoAttention, NoMlp, is_absent
from compresso.arch.base import LayerShape
from compresso.arch.decoder_shape import checked_shapes, sync_config_, sync_groups_
from compresso.arch.producers import Producers, producers
from compresso.arch.stream import hidden_axis
from compresso.arch.vocabulary import vocabulary_axis
from compresso.core.axis import Axis, Gate, Kind, Slice
from compresso.core.cost import Group, Weight

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True, slots=True)
class Decoder:
    """An `Arch` for decoders with the module names and the mathematics in this file's header.

    Args:
        name: the `model_type` described.
        head_norms: norms inside the attention that run over one head's entries; they are shared by all heads and leave
            with the last.
    """

    name: str
    head_norms: tuple[str, ...] = ()

    def matches(self, config: PreTrainedConfig) -> bool:
        """Whether the config has this model type."""
        return config.model_type == self.name

    def axes(self, model: PreTrainedModel) -> tuple[Axis, ...]:
        """`layers.{i}.heads` and `layers.{i}.channels` of what is there, then `hidden`, `layers`, `attention`, `mlp`,
        `vocab`.
        """
        return decoder_axes(model, self.head_norms)

    def weights(self, model: PreTrainedModel) -> tuple[Weight, ...]:
        """Every parameter, tied ones once; a tied head's multiplications are counted at the embedding."""
        checked_shapes(model, self.head_norms)
        tied = _is_tied(model)
        return tuple(_weight(name, tuple(parameter.shape), tied) for name, parameter in model.named_parameters())

    def blocks(self, model: PreTrainedModel) -> nn.ModuleList:
        """`model.layers`."""
        layers = model.get_submodule("model.layers")
        assert isinstance(layers, nn.ModuleList)
        return layers

    def linear_groups(self, block: nn.Module) -> tuple[tuple[str, ...], ...]:
        """(q, k, v), (o), (gate, up), (down), without those of removed sub-layers."""
        attention = () if is_absent(block.get_submodule("self_attn")) else (_ATTENTION[:3], _ATTENTION[3:])
        mlp = () if is_absent(block.get_submodule("mlp")) else (_MLP[:2], _MLP[2:])
        return attention + mlp

    def producers(self, block: nn.Module) -> Producers:
        """The norms; v for o if heads share no values; up for down."""
        here = self.linear_groups(block)
        norms = {_ATTENTION[:3]: "input_layernorm", _MLP[:2]: "post_attention_layernorm"}
        writers = {_ATTENTION[3:]: "self_attn.v_proj", _MLP[2:]: "mlp.up_proj"}
        return producers(
            block, {k: v for k, v in norms.items() if k in here}, {k: v for k, v in writers.items() if k in here}
        )

    def shapes(self, model: PreTrainedModel) -> list[LayerShape]:
        """The widths of each layer.

        Raises:
            ArchError: the modules are not what the config says.
        """
        return checked_shapes(model, self.head_norms)

    def empty_(self, block: nn.Module, kind: Kind) -> None:
        """Put `NoAttention` or `NoMlp` in the sub-layer's place and an identity in its norm's."""
        if kind == Kind.ATTENTION:
            block.self_attn, block.input_layernorm = NoAttention(), nn.Identity()
        elif kind == Kind.MLP:
            block.mlp, block.post_attention_layernorm = NoMlp(), nn.Identity()
        else:
            raise ValueError(f"only an attention or an mlp can be emptied, got {kind}")

    def sync_config_(self, model: PreTrainedModel) -> None:
        """Bring config and shape fields in line with the parameters; see `compresso.arch.decoder_shape`."""
        sync_groups_(model)
        sync_config_(model, checked_shapes(model, self.head_norms, against_config=False))


def decoder_axes(model: PreTrainedModel, head_norms: tuple[str, ...]) -> tuple[Axis, ...]:
    """The axes of a decoder. head_norms: names of norms shared by the heads of one attention."""
    shapes = checked_shapes(model, head_norms)
    axes: list[Axis] = []
    for i, shape in enumerate(shapes):
        if shape.kv_heads:
            axes.append(heads_axis(model, i, shape, head_norms))
        if shape.channels:
            axes.append(channels_axis(model, i, shape))
    attentions = {i: f"model.layers.{i}.self_attn.o_proj" for i, shape in enumerate(shapes) if shape.kv_heads}
    mlps = {i: f"model.layers.{i}.mlp.down_proj" for i, shape in enumerate(shapes) if shape.channels}
    owned_by_attention = {i: (f"model.layers.{i}.self_attn.", f"model.layers.{i}.input_layernorm.") for i in attentions}
    owned_by_mlp = {i: (f"model.layers.{i}.mlp.", f"model.layers.{i}.post_attention_layernorm.") for i in mlps}
    owned_by_layer = {i: (f"model.layers.{i}.",) for i in range(len(shapes))}
    written = (*attentions.values(), *mlps.values())
    read = {name for name, _ in model.named_modules() if name.endswith((*_ATTENTION[:3], *_MLP[:2]))}
    norms = {name for name, _ in model.named_modules() if name.endswith("layernorm")}
    axes.append(hidden_axis(model, written, read, norms, "model.norm"))
    for name, kind, owned, sites in (
        ("layers", Kind.LAYER, owned_by_layer, (attentions, mlps)),
        ("attention", Kind.ATTENTION, owned_by_attention, (attentions,)),
        ("mlp", Kind.MLP, owned_by_mlp, (mlps,)),
    ):
        slices = tuple(
            Slice(p, 0, unit=i)
            for i, prefixes in owned.items()
            for p in _inside(model, f"model.layers.{i}")
            if p.startswith(prefixes)
        )
        gates = tuple(Gate(module, "output", unit=i) for site in sites for i, module in site.items())
        axes.append(Axis(name, kind, len(shapes), slices, gates, "model.layers"))
    return (*axes, vocabulary_axis(model))


def heads_axis(model: PreTrainedModel, i: int, shape: LayerShape, head_norms: tuple[str, ...]) -> Axis:
    """One key/value head with its query heads: rows of q, k, v and columns of o."""
    attention = f"model.layers.{i}.self_attn"
    head_dim = _linear(model, f"{attention}.k_proj").out_features // shape.kv_heads
    group = head_dim * (shape.query_heads // shape.kv_heads)
    rows = [(f"{attention}.q_proj", group), (f"{attention}.k_proj", head_dim), (f"{attention}.v_proj", head_dim)]
    slices = [Slice(name, 0, width) for module, width in rows for name in _tensors(model, module)]
    biased = _linear(model, f"{attention}.o_proj").bias is not None
    leaving = (f"model.layers.{i}.input_layernorm.weight", *(f"{attention}.{norm}.weight" for norm in head_norms))
    return Axis(
        name=f"layers.{i}.heads",
        kind=Kind.HEAD,
        size=shape.kv_heads,
        slices=(*slices, Slice(f"{attention}.o_proj.weight", 1, group)),
        gates=(Gate(f"{attention}.o_proj", "input", group),),
        container=attention,
        layer=i,
        with_last_unit=() if biased else leaving,
        min_units=int(biased),
    )


def channels_axis(model: PreTrainedModel, i: int, shape: LayerShape) -> Axis:
    """One FFN unit: a row of gate and up and a column of down."""
    mlp = f"model.layers.{i}.mlp"
    read = (f"{mlp}.gate_proj", f"{mlp}.up_proj")
    biased = _linear(model, f"{mlp}.down_proj").bias is not None
    return Axis(
        name=f"layers.{i}.channels",
        kind=Kind.CHANNEL,
        size=shape.channels,
        slices=(
            *(Slice(name, 0) for module in read for name in _tensors(model, module)),
            Slice(f"{mlp}.down_proj.weight", 1),
        ),
        gates=tuple(Gate(module, "output") for module in read),
        container=mlp,
        layer=i,
        with_last_unit=() if biased else (f"model.layers.{i}.post_attention_layernorm.weight",),
        min_units=int(biased),
    )


def _weight(name: str, shape: tuple[int, ...], tied: bool) -> Weight:
    """How one parameter is counted."""
    module, _, tensor = name.rpartition(".")
    if module == "lm_head":
        return Weight(name, shape, Group.EMBEDDINGS, macs=1)
    if module == "model.embed_tokens":
        return Weight(name, shape, Group.EMBEDDINGS, macs=int(tied))
    if not _is_linear(module):
        return Weight(name, shape, Group.NORMS)
    is_matrix = tensor == "weight"
    cached = shape[0] if is_matrix and module.endswith(("k_proj", "v_proj")) else 0
    return Weight(name, shape, Group.BLOCKS, macs=int(is_matrix), cached=cached)


def _is_linear(module: str) -> bool:
    """Whether a module name is that of a linear inside a layer."""
    return module.endswith((*_ATTENTION, *_MLP))


def _is_tied(model: PreTrainedModel) -> bool:
    """Whether head and embedding are one parameter."""
    return model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")


def _linear(model: PreTrainedModel, name: str) -> nn.Linear:
    """A linear by name."""
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def _inside(model: PreTrainedModel, module: str) -> Iterator[str]:
    """Qualified names of a module's parameters, without a walk over the others: of deep models there are many."""
    return (name for name, _ in model.get_submodule(module).named_parameters(prefix=module))


def _tensors(model: PreTrainedModel, module: str) -> Iterator[str]:
    """Qualified names of a linear's weight and, where it has one, bias."""
    return (f"{module}.{name}" for name, _ in model.get_submodule(module).named_parameters())
