"""Stacks of attention and FFN described once by the names of their parts: OPT, GPT-2, GPT-NeoX, BLOOM, Phi, Phi-3, GLM,
BERT, RoBERTa, DistilBERT, ViT and Gemma.

    stream -> [ + o(attention(q, k, v)), + down(act(up)) or + down(act(gate) * up) ] x layers

Heads are masked before `o`, FFN channels before `down`, so any activation will do; whole sub-layers at the output of
`o` and `down`. Most have no hidden axis: LayerNorm subtracts a mean over the stream, which a removed dimension would
change; of BERT, whose norms write the stream, dimensions can leave (`encoder_stream.py`); Gemma says its own reason. A
norm before a sub-layer leaves with it. A norm behind the residual sum (BERT) stays, so that such a model has no axis of
whole layers: norm(x + 0) is not x. A bias on `o` or `down` outlives the last unit, which therefore has to be kept. Of
multiply-accumulates a token, those of layers and of language-model heads are counted; poolers, classifiers and the
projection of image patches do not run once a token and count none. Everything outside the layers that is no norm is
counted with the embeddings.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from compresso.arch.absent import NoAttention, NoAttentionSum, NoMlp, NoMlpSum
from compresso.arch.base import LayerShape
from compresso.arch.decoder_shape import PLAIN_LAYER_TYPES
from compresso.arch.encoder_stream import EncoderStream
from compresso.arch.head_channels import narrow_heads_, with_head_channels
from compresso.arch.parts import Parts, output_dim
from compresso.arch.producers import Producers, producers
from compresso.arch.stack_axes import channels_axis, heads_axis
from compresso.arch.stack_config import sync_config_
from compresso.arch.stack_shapes import lacks, shapes_of
from compresso.arch.stream import hidden_axis, is_norm
from compresso.arch.vocabulary import vocabulary_axis
from compresso.core.axis import Axis, Gate, Kind, Slice
from compresso.core.cost import Group, Weight
from compresso.errors import ArchError

_ONCE_A_TOKEN = (
    *("lm_head.", "embed_out.", "cls.predictions.", "model.decoder.project_"),
    *("vocab_transform.", "vocab_projector.", "qa_outputs."),
)


def _always(_: PreTrainedConfig) -> bool:
    return True


def _never(_: PreTrainedConfig) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Stack:
    """An `Arch` for models of the form in this file's header.

    Args:
        name: the `model_type` described.
        layers: where the list of layers may lie, depending on the head.
        parts: the names of a layer's parts.
        generates: whether keys and values are cached.
        norm_first: whether, by its config, a model's norms lie before the sub-layers and not behind the residual sums.
        final_norm: where the norm that only the head reads may lie, if all norms are RMSNorms and hidden dimensions can
            leave.
        stream: what touches the stream of an encoder whose hidden dimensions can leave.
        obeys_head_dim: whether, by its config, a model whose config class has no field `head_dim` is built by it if
            given one.
    """

    name: str
    layers: tuple[str, ...]
    parts: Parts
    generates: bool
    norm_first: Callable[[PreTrainedConfig], bool] = _always
    final_norm: tuple[str, ...] = ()
    obeys_head_dim: Callable[[PreTrainedConfig], bool] = _never
    stream: EncoderStream | None = None

    def with_head_channels(self, model: PreTrainedModel, axes: Sequence[Axis]) -> tuple[Axis, ...]:
        """These axes, and those of the channels of heads where hidden dimensions can leave with them: a head is as wide
        there as the hidden size over the number of heads says.
        """
        return tuple(axes) if self.stream is None else with_head_channels(axes, self._where(model), self.parts)

    def narrow_heads_(self, block: nn.Module, width: int) -> None:
        """Tell a layer, whose tensors are cut, how wide its heads are."""
        narrow_heads_(block, self.parts, width)

    def matches(self, config: PreTrainedConfig) -> bool:
        """Whether the config has this model type."""
        return config.model_type == self.name

    def blocks(self, model: PreTrainedModel) -> nn.ModuleList:
        """The layers, in order.

        Raises:
            ArchError: the model has none where its family keeps them.
        """
        layers = model.get_submodule(self._where(model))
        assert isinstance(layers, nn.ModuleList)
        return layers

    def shapes(self, model: PreTrainedModel) -> list[LayerShape]:
        """The widths of each layer.

        Raises:
            ArchError: the modules are not what the config says.
        """
        shapes = self._shapes(model)
        if len(shapes) != model.config.num_hidden_layers:
            raise ArchError(
                f"the config says num_hidden_layers={model.config.num_hidden_layers}, the model has {len(shapes)}; "
                "load the model and its config from one checkpoint"
            )
        types = getattr(model.config, "layer_types", None)
        if types is not None and (len(types) != len(shapes) or set(types) - set(PLAIN_LAYER_TYPES)):
            raise ArchError(
                f"layer_types {types[:4]} are not those of a plain {self.name}; wanted {' or '.join(PLAIN_LAYER_TYPES)}"
                " a layer"
            )
        return shapes

    def axes(self, model: PreTrainedModel) -> tuple[Axis, ...]:
        """`layers.{i}.heads` and `.channels` of what is there, `hidden` (of RMSNorm models), `layers` (if norms lie
        first), `attention`, `mlp`, `vocab` (of models that generate).
        """
        where, shapes, head = self._where(model), self.shapes(model), model.get_output_embeddings()
        axes, norms_first = list[Axis](), self.norm_first(model.config)
        for i, shape in enumerate(shapes):
            if shape.kv_heads and not self.parts.heads_stay:
                axes.append(heads_axis(model, where, i, shape, self.parts, norms_first=norms_first))
            if shape.channels:
                axes.append(channels_axis(model, where, i, shape, self.parts, norms_first=norms_first))
        attentions = {i: self._owned(model.config, Kind.ATTENTION) for i, shape in enumerate(shapes) if shape.kv_heads}
        mlps = {i: self._owned(model.config, Kind.MLP) for i, shape in enumerate(shapes) if shape.channels}
        every = dict.fromkeys(range(len(shapes)), ("",))
        o, down = self.parts.write, self.parts.down
        if (hidden := self._hidden(model, where, tuple(attentions), tuple(mlps))) is not None:
            axes.append(hidden)
        rows = [("layers", Kind.LAYER, every, ((attentions, o), (mlps, down)))] if norms_first else []
        rows += [
            ("attention", Kind.ATTENTION, attentions, ((attentions, o),)),
            ("mlp", Kind.MLP, mlps, ((mlps, down),)),
        ]
        for name, kind, owned, sites in rows:
            prefixes = {
                i: tuple(f"{where}.{i}.{part}." if part else f"{where}.{i}." for part in parts)
                for i, parts in owned.items()
            }
            slices = tuple(
                Slice(p, 0, unit=i)
                for i, of in prefixes.items()
                for p, _ in model.get_submodule(f"{where}.{i}").named_parameters(prefix=f"{where}.{i}")
                if p.startswith(of)
            )
            gates = tuple(Gate(f"{where}.{i}.{module}", "output", unit=i) for present, module in sites for i in present)
            axes.append(Axis(name, kind, len(shapes), slices, gates, where))
        return (*axes, vocabulary_axis(model)) if self.generates and head is not None else tuple(axes)

    def weights(self, model: PreTrainedModel) -> tuple[Weight, ...]:
        """Every parameter, tied ones once; a tied head's multiplications are counted at the embedding."""
        shapes, blocks, parts = self.shapes(model), self.blocks(model), self.parts
        head, where = model.get_output_embeddings(), self._where(model) + "."
        tied = None if head is None else head.weight
        weights: list[Weight] = []
        for name, parameter in model.named_parameters():
            module, _, tensor = name.rpartition(".")
            shape, is_matrix = tuple(parameter.shape), tensor == "weight" and parameter.dim() == 2
            if is_norm(module):
                weights.append(Weight(name, shape, Group.NORMS))
            elif name.startswith(where):
                index, _, inside = module.removeprefix(where).partition(".")
                kv_entries = shapes[int(index)].kv_heads * int(
                    getattr(blocks[int(index)].get_submodule(parts.core), parts.head_dim, 0)
                )
                cached = parts.cached(inside, kv_entries) if self.generates and is_matrix else 0
                output = output_dim(model.get_submodule(module))
                weights.append(Weight(name, shape, Group.BLOCKS, macs=int(is_matrix), cached=cached, output=output))
            else:
                runs = is_matrix and (name.startswith(_ONCE_A_TOKEN) or parameter is tied)
                weights.append(Weight(name, shape, Group.EMBEDDINGS, macs=int(runs)))
        return tuple(weights)

    def linear_groups(self, block: nn.Module) -> tuple[tuple[str, ...], ...]:
        """(q, k, v), (o), (gate, up) or (up), (down), without those of removed sub-layers; (q, k, v, up), (o), (down)
        where attention and FFN read one norm.
        """
        parts = self.parts
        read, write = ((), ()) if lacks(block, parts, Kind.ATTENTION) else (parts.read, (parts.write,))
        up, down = ((), ()) if lacks(block, parts, Kind.MLP) else (parts.up, (parts.down,))
        groups = ((*read, *up), write, down) if parts.shared_norms else (read, write, up, down)
        return tuple(group for group in groups if group)

    def producers(self, block: nn.Module) -> Producers:
        """Norms that lie first; v for o if it is apart and heads share no values; up for down where a gate multiplies
        it.
        """
        parts, here = self.parts, self.linear_groups(block)
        of_group = ((parts.read, parts.attention_norms), (parts.up, parts.ffn_norms))
        if parts.shared_norms:
            of_group = ((here[0] if here else (), parts.shared_norms),)
        norms = {names: of[0] for names, of in of_group if of and _norms_first(block)}
        writers = {(parts.write,): parts.read[2]} if parts.packing == "apart" else {}
        writers |= {(parts.down,): parts.up[1]} if len(parts.up) == 2 else {}
        return producers(
            block, {k: v for k, v in norms.items() if k in here}, {k: v for k, v in writers.items() if k in here}
        )

    def empty_(self, block: nn.Module, kind: Kind) -> None:
        """Put modules that add nothing in a sub-layer's place and identities in that of the
        norms that leave with it.
        """
        parts = self.parts
        if kind == Kind.ATTENTION:
            block.set_submodule(parts.core, NoAttentionSum() if parts.adds_stream else NoAttention())
            if not parts.write.startswith(parts.core + "."):
                block.set_submodule(parts.write, NoMlp())
        elif kind == Kind.MLP:
            for up in () if parts.ffn else parts.up:
                block.set_submodule(up, nn.Identity())
            block.set_submodule(parts.ffn or parts.down, NoMlpSum() if parts.adds_stream else NoMlp())
        else:
            raise ValueError(f"only an attention or an mlp can be emptied, got {kind}")
        for norm in self._norms(kind) if _norms_first(block) else ():
            block.set_submodule(norm, nn.Identity())

    def sync_config_(self, model: PreTrainedModel) -> None:
        """Set config and shape fields to what the parameters are, and give each attention its cache slot."""
        final = self._final(model) if self.final_norm else None
        sync_config_(
            model,
            self.blocks(model),
            self.parts,
            self._shapes(model),
            final,
            reads_hidden=self.stream is not None,
            obeys_head_dim=self.obeys_head_dim(model.config),
        )

    def _final(self, model: PreTrainedModel) -> str:
        """Qualified name of the norm that only the head reads."""
        modules = dict(model.named_modules())
        return next(name for name in self.final_norm if name in modules)

    def _where(self, model: PreTrainedModel) -> str:
        """Qualified name of the list of layers."""
        for name in self.layers:
            try:
                found = model.get_submodule(name)
            except AttributeError:
                continue
            if isinstance(found, nn.ModuleList) and len(found):
                return name
        raise ArchError(
            f"{type(model).__name__} has no layers at {' or '.join(self.layers)}; load it with a stock class of"
            f" {self.name}"
        )

    def _norms(self, kind: Kind) -> tuple[str, ...]:
        return self.parts.attention_norms if kind == Kind.ATTENTION else self.parts.ffn_norms

    def _owned(self, config: PreTrainedConfig, kind: Kind) -> tuple[str, ...]:
        """What leaves with a sub-layer, relative to the layer."""
        parts = self.parts
        linears = (*parts.read, parts.write, *parts.head_norms) if kind == Kind.ATTENTION else (*parts.up, parts.down)
        return linears + (self._norms(kind) if self.norm_first(config) else ())

    def _shapes(self, model: PreTrainedModel) -> list[LayerShape]:
        """The widths of each layer, read off its linears. Raises ArchError if a module or a width is not the stock
        layer's.
        """
        return shapes_of(self.blocks(model), self._where(model), self.parts, self.name)

    def _hidden(
        self, model: PreTrainedModel, where: str, attentions: Sequence[int], mlps: Sequence[int]
    ) -> Axis | None:
        """One dimension of the stream; None where none can leave. attentions, mlps: the layers that have one."""
        parts = self.parts
        read = [
            f"{where}.{i}.{name}"
            for layers, names in ((attentions, parts.read), (mlps, parts.up))
            for i in layers
            for name in names
        ]
        written = [
            f"{where}.{i}.{name}" for layers, name in ((attentions, parts.write), (mlps, parts.down)) for i in layers
        ]
        if self.stream is not None:
            return self.stream.axis(model, where, written, read)
        if not self.final_norm:
            return None
        norms = {
            f"{where}.{i}.{norm}" for i in (*attentions, *mlps) for norm in (*parts.attention_norms, *parts.ffn_norms)
        }
        return hidden_axis(model, written, read, norms, self._final(model))


def _norms_first(block: nn.Module) -> bool:
    """Whether a layer's norms lie before its sub-layers and feed nothing but these; what `norm_first` says of a config,
    said by a layer.
    """
    behind = getattr(block, "apply_residual_connection_post_layernorm", False)  # BLOOM's, which feed the sums too
    return bool(getattr(block, "do_layer_norm_before", True)) and not behind
