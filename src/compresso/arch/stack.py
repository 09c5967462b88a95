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

from compresso.arch.absent import NoAttention, NoAttentionSum, NoMlp, NoMlpSum, is_absent
from compresso.arch.base import LayerShape
from compresso.arch.decoder_shape import PLAIN_LAYER_TYPES, cache_slots
from compresso.arch.encoder_stream import EncoderStream
from compresso.arch.layer_config import config_of_layer, tell_head_dim_
from compresso.arch.parts import Parts, output_dim, tensors, written
from compresso.arch.producers import Producers, producers
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
        axes: list[Axis] = []
        for i, shape in enumerate(shapes):
            if shape.kv_heads and not self.parts.heads_stay:
                axes.append(self._heads(model, f"{where}.{i}", i, shape))
            if shape.channels:
                axes.append(self._channels(model, f"{where}.{i}", i, shape))
        attentions = {i: self._owned(model.config, Kind.ATTENTION) for i, shape in enumerate(shapes) if shape.kv_heads}
        mlps = {i: self._owned(model.config, Kind.MLP) for i, shape in enumerate(shapes) if shape.channels}
        every = dict.fromkeys(range(len(shapes)), ("",))
        o, down = self.parts.write, self.parts.down
        if (hidden := self._hidden(model, where, tuple(attentions), tuple(mlps))) is not None:
            axes.append(hidden)
        rows = [("layers", Kind.LAYER, every, ((attentions, o), (mlps, down)))] if self.norm_first(model.config) else []
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
        read, write = ((), ()) if self._is_empty(block, Kind.ATTENTION) else (parts.read, (parts.write,))
        up, down = ((), ()) if self._is_empty(block, Kind.MLP) else (parts.up, (parts.down,))
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
        """Set config and shape fields to what the parameters are, and give each attention its cache slot.

        `num_attention_heads` becomes the largest count of a layer. Where the config has no head_dim, a stock class
        built from it would give heads another width; the exporter refuses such a model. Phi and Phi-3 have no such
        field but obey it, so they are given one.
        """
        config, blocks, shapes, parts = model.config, self.blocks(model), self._shapes(model), self.parts
        config.num_hidden_layers = len(blocks)
        if self.final_norm:
            norm = model.get_submodule(self._final(model))
            config.hidden_size, config.rms_norm_eps = len(norm.get_parameter("weight")), norm.variance_epsilon
        elif self.stream is not None:
            config.hidden_size = model.get_input_embeddings().get_parameter("weight").shape[1]
        if any(shape.kv_heads for shape in shapes):
            config.num_attention_heads = max(shape.query_heads for shape in shapes)
            if hasattr(config, "num_key_value_heads"):
                config.num_key_value_heads = max(shape.kv_heads for shape in shapes)
            if self.obeys_head_dim(config):
                core = next(b.get_submodule(parts.core) for b, s in zip(blocks, shapes, strict=True) if s.kv_heads)
                tell_head_dim_(config, int(getattr(core, parts.head_dim)))
        if parts.channels and any(shape.channels for shape in shapes):
            setattr(config, parts.channels, max(shape.channels for shape in shapes))
        cores = [block.get_submodule(parts.core) for block in blocks]
        kinds = [
            getattr(core, "layer_type", None) or "" if s.kv_heads else None
            for core, s in zip(cores, shapes, strict=True)
        ]
        labels, slots = cache_slots(kinds)
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = [label or "full_attention" for label in labels]
        for block, core, shape, slot in zip(blocks, cores, shapes, slots, strict=True):
            if slot is not None and hasattr(core, "layer_idx"):
                core.layer_idx = slot  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
            if shape.kv_heads:
                width = int(getattr(core, parts.head_dim))
                fields: dict[str, object] = dict.fromkeys(parts.heads, shape.query_heads)
                fields |= dict.fromkeys(parts.kv_heads, shape.kv_heads) | dict.fromkeys(
                    parts.widths, shape.query_heads * width
                )
                if hasattr(core, "num_key_value_groups"):
                    fields["num_key_value_groups"] = shape.query_heads // shape.kv_heads
                if parts.heads_in_config:
                    fields["config"] = config_of_layer(config, shape.query_heads, width)
                for field, value in fields.items():
                    setattr(core, field, value)
            if parts.ffn and parts.channels and shape.channels:
                mlp = block.get_submodule(parts.ffn)
                if hasattr(mlp, parts.channels):
                    setattr(mlp, parts.channels, shape.channels)

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

    def _is_empty(self, block: nn.Module, kind: Kind) -> bool:
        return is_absent(
            block.get_submodule(self.parts.core if kind == Kind.ATTENTION else self.parts.ffn or self.parts.down)
        )

    def _shapes(self, model: PreTrainedModel) -> list[LayerShape]:
        """The widths of each layer, read off its linears. Raises ArchError if a module or a width is not the stock
        layer's.
        """
        where, parts = self._where(model), self.parts
        norms = (*parts.head_norms, *parts.attention_norms, *parts.ffn_norms, *parts.shared_norms, *parts.sum_norms)
        known = (*parts.read, parts.write, *parts.up, parts.down, *norms)
        shapes: list[LayerShape] = []
        for i, block in enumerate(self.blocks(model)):
            for name, _ in block.named_parameters():
                if name.rpartition(".")[0] not in known:
                    raise ArchError(
                        f"parameter '{where}.{i}.{name}' is not part of a plain {self.name}; merge adapters, pass the"
                        " stock model"
                    )
            query_heads = kv_heads = channels = 0
            if not self._is_empty(block, Kind.ATTENTION):
                head_dim = int(getattr(block.get_submodule(parts.core), parts.head_dim, 0))
                widths = parts.head_widths(block, f"{where}.{i}")
                heads = [0 if not head_dim or width % head_dim else width // head_dim for width in widths]
                query_heads, kv_heads = heads[0], heads[1]
                if not kv_heads or heads != [query_heads, kv_heads, kv_heads, query_heads] or query_heads % kv_heads:
                    raise ArchError(
                        f"{where}.{i}.{parts.attention} has {heads} heads in q, k, v and o; wanted as many in q and o,"
                        " and in k and v"
                    )
            if not self._is_empty(block, Kind.MLP):
                *ups, channels = parts.ffn_widths(block, f"{where}.{i}")
                if any(up != channels for up in ups):
                    raise ArchError(f"{where}.{i}.{parts.down} reads {channels} channels, {ups} are written")
            shapes.append(LayerShape(query_heads, kv_heads, channels))
        return shapes

    def _heads(self, model: PreTrainedModel, block: str, i: int, shape: LayerShape) -> Axis:
        """One key/value head with its query heads: rows of q, k, v and columns of o."""
        parts = self.parts
        head_dim = int(getattr(model.get_submodule(f"{block}.{parts.core}"), parts.head_dim))
        group = head_dim * (shape.query_heads // shape.kv_heads)
        slices = written(model, block, parts.head_runs(shape.kv_heads, group, head_dim))
        writer = f"{block}.{parts.write}"
        return self._axis(
            model,
            f"layers.{i}.heads",
            Kind.HEAD,
            shape.kv_heads,
            i,
            (slices, writer, group),
            f"{block}.{parts.attention}",
        )

    def _channels(self, model: PreTrainedModel, block: str, i: int, shape: LayerShape) -> Axis:
        """One FFN unit: a row of what reads the stream and a column of down."""
        parts = self.parts
        slices = written(model, block, parts.channel_runs(shape.channels))
        container = f"{block}.{parts.ffn}" if parts.ffn else block
        return self._axis(
            model,
            f"layers.{i}.channels",
            Kind.CHANNEL,
            shape.channels,
            i,
            (slices, f"{block}.{parts.down}", 1),
            container,
        )

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

    def _axis(
        self,
        model: PreTrainedModel,
        name: str,
        kind: Kind,
        size: int,
        layer: int,
        ends: tuple[tuple[Slice, ...], str, int],
        container: str,
    ) -> Axis:
        """An axis of one layer. ends: the slices that write the units, the linear that reads them, and the width it
        reads of each.
        """
        slices, reader, width = ends
        biased = f"{reader}.bias" in dict(model.get_submodule(reader).named_parameters(prefix=reader))
        block = f"{self._where(model)}.{layer}"
        norms = (*self._norms(Kind.ATTENTION), *self.parts.head_norms) if kind == Kind.HEAD else self._norms(Kind.MLP)
        there = dict(model.get_submodule(block).named_modules())
        leaving = (
            tuple(p for norm in norms if norm in there for p in tensors(model, f"{block}.{norm}"))
            if self.norm_first(model.config)
            else ()
        )
        return Axis(
            name=name,
            kind=kind,
            size=size,
            slices=(*slices, Slice(f"{reader}.weight", 1 - output_dim(model.get_submodule(reader)), width)),
            gates=(Gate(reader, "input", width),),
            container=container,
            layer=layer,
            with_last_unit=() if biased else leaving,
            min_units=int(biased),
        )


def _norms_first(block: nn.Module) -> bool:
    """Whether a layer's norms lie before its sub-layers and feed nothing but these; what `norm_first` says of a config,
    said by a layer.
    """
    behind = getattr(block, "apply_residual_connection_post_layernorm", False)  # BLOOM's, which feed the sums too
    return bool(getattr(block, "do_layer_norm_before", True)) and not behind
