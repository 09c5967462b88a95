"""Pre-norm decoders some or all of whose FFNs are mixtures of experts, described once; their files state what differs.

    embed_tokens -> [ + o(attention(norm)), + FFN or mixture of norm ] x layers -> norm -> lm_head

Attention and dense FFN are those of `arch/decoder.py`, or an attention that stays whole: where a norm runs over all
heads (OLMoE), where keys and values come from one compressed vector (DeepSeek's MLA), or where heads have sinks
(gpt-oss). Experts leave by minus infinity before the router's choice (`core/routing.py`); the number that a token takes
stays. A shared expert stays as wide as it is, and leaves with its mixture. Stacks are one tensor for all experts of a
layer, so that these are equally wide.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from compresso.arch.absent import NoAttention, NoExperts, NoMlp, is_absent
from compresso.arch.base import LayerShape
from compresso.arch.decoder import channels_axis, heads_axis
from compresso.arch.decoder_shape import cache_slots
from compresso.arch.expert_feeders import expert_feeders
from compresso.arch.mixture import EXPERTS, SHARED, Mixture, mixture_of
from compresso.arch.producers import Producers, producers
from compresso.arch.stream import hidden_axis, is_norm
from compresso.arch.vocabulary import vocabulary_axis
from compresso.core.axis import Axis, Gate, Kind, Slice
from compresso.core.cost import Group, Weight
from compresso.errors import ArchError

_LAYERS = "model.layers"
_FFN = ("gate_proj", "up_proj", "down_proj")
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""What configs call the number of experts; some have one field under two names."""


@dataclass(frozen=True, slots=True)
class MoeDecoder:
    """An `Arch` for decoders of the form in this file's header.

    Args:
        name: the `model_type` described.
        width: field of the config that says how wide an expert is.
        read: linears of the attention that read the stream; a model may have some of them.
        inner: its other linears, but for `o_proj`.
        head_norms: norms over one head's entries, shared by all heads; a model may lack them.
        heads_stay: whether the attention stays whole.
        cached: linears whose outputs are what the cache holds.
        gives_scores: whether the stock FFN gives the router's scores, too.
    """

    name: str
    width: str = "moe_intermediate_size"
    read: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    inner: tuple[str, ...] = ()
    head_norms: tuple[str, ...] = ()
    heads_stay: bool = False
    cached: tuple[str, ...] = ("k_proj", "v_proj")
    gives_scores: bool = False

    def matches(self, config: PreTrainedConfig) -> bool:
        """Whether the config has this model type."""
        return config.model_type == self.name

    def blocks(self, model: PreTrainedModel) -> nn.ModuleList:
        """`model.layers`.

        Raises:
            ArchError: the model has none, or no head.
        """
        modules = dict(model.named_modules())
        layers = modules.get(_LAYERS)
        if not isinstance(layers, nn.ModuleList) or not len(layers) or "lm_head" not in modules:
            raise ArchError(
                f"{type(model).__name__} is not a causal language model with a decoder; load it with its head"
            )
        return layers

    def shapes(self, model: PreTrainedModel) -> list[LayerShape]:
        """The widths of each layer.

        Raises:
            ArchError: the modules are not what the config says.
        """
        return self._checked(model)[0]

    def axes(self, model: PreTrainedModel) -> tuple[Axis, ...]:
        """`layers.{i}.heads` (where heads can leave), `.channels` of dense layers, `.experts` and `.expert_channels` of
        the others, then `hidden`, `layers`, `attention`, `mlp`, `vocab`.
        """
        shapes, mixtures = self._checked(model)
        axes: list[Axis] = []
        for i, shape in enumerate(shapes):
            if shape.kv_heads and not self.heads_stay:
                norms = tuple(n for n in self.head_norms if hasattr(self.blocks(model)[i].self_attn, n))
                axes.append(heads_axis(model, i, shape, norms))
            if i in mixtures:
                axes += [mixtures[i].experts_axis(i), mixtures[i].channels_axis(i)]
            elif shape.channels:
                axes.append(channels_axis(model, i, shape))
        attentions = {
            i: Gate(f"{_LAYERS}.{i}.self_attn.o_proj", "output", unit=i) for i, s in enumerate(shapes) if s.kv_heads
        }
        ffns = {i: _ffn_gate(i, mixtures.get(i)) for i, shape in enumerate(shapes) if shape.channels}
        axes.append(self._hidden(model, mixtures, attentions, ffns))
        for name, kind, parts, sites in (
            ("layers", Kind.LAYER, ("",), (attentions, ffns)),
            ("attention", Kind.ATTENTION, ("self_attn.", "input_layernorm."), (attentions,)),
            ("mlp", Kind.MLP, ("mlp.", "post_attention_layernorm."), (ffns,)),
        ):
            there = range(len(shapes)) if kind == Kind.LAYER else sites[0]
            prefixes = {i: tuple(f"{_LAYERS}.{i}.{part}" for part in parts) for i in there}
            slices = tuple(
                Slice(p, 0, unit=i)
                for i, of in prefixes.items()
                for p, _ in model.get_submodule(f"{_LAYERS}.{i}").named_parameters(prefix=f"{_LAYERS}.{i}")
                if p.startswith(of)
            )
            gates = tuple(replace(gate, unit=i) for site in sites for i, gate in site.items())
            axes.append(Axis(name, kind, len(shapes), slices, gates, _LAYERS))
        return (*axes, vocabulary_axis(model))

    def weights(self, model: PreTrainedModel) -> tuple[Weight, ...]:
        """Every parameter, tied ones once; of experts the multiplications of those that a token takes."""
        mixtures = self._checked(model)[1]
        inside = {
            f"{mixture.where}.{name}": mixture.weight(name) for mixture in mixtures.values() for name in mixture.tensors
        }
        tied = model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")
        found: list[Weight] = []
        for name, parameter in model.named_parameters():
            module, _, tensor = name.rpartition(".")
            shape = tuple(parameter.shape)
            if name in inside:
                found.append(inside[name])
            elif is_norm(module):
                found.append(Weight(name, shape, Group.NORMS))
            elif not name.startswith(f"{_LAYERS}."):
                found.append(Weight(name, shape, Group.EMBEDDINGS, macs=int(module == "lm_head" or tied)))
            else:
                is_matrix = tensor == "weight"
                cached = shape[0] if is_matrix and module.rpartition(".")[2] in self.cached else 0
                found.append(Weight(name, shape, Group.BLOCKS, macs=int(is_matrix), cached=cached))
        return tuple(found)

    def linear_groups(self, block: nn.Module) -> tuple[tuple[str, ...], ...]:
        """Linears of the attention, and of the dense FFN or the shared expert; stacked experts are not among them."""
        attention, mlp = block.get_submodule("self_attn"), block.get_submodule("mlp")
        groups: list[tuple[str, ...]] = []
        if not is_absent(attention):
            groups += [tuple(f"self_attn.{n}" for n in self.read if getattr(attention, n, None) is not None)]
            groups += [(f"self_attn.{n}",) for n in (*self.inner, "o_proj") if getattr(attention, n, None) is not None]
        if not is_absent(mlp):
            names = dict(mlp.named_modules())
            inside = next((f"{name}." for name in SHARED if name in names), "")
            if EXPERTS not in names or inside:
                gate, up, down = (f"mlp.{inside}{name}" for name in _FFN)
                groups += [(gate, up), (down,)]
        return tuple(groups)

    def producers(self, block: nn.Module) -> Producers:
        """Norms in front of attention and FFN; v for o if heads share no values; up for down, in each expert, too."""
        here = self.linear_groups(block)
        norms = {names: "input_layernorm" for names in here if len(names) > 1 and names[0].startswith("self_attn.")}
        norms |= {names: "post_attention_layernorm" for names in here if names[0] == "mlp.gate_proj"}
        writers = {names: names[0].replace("down_proj", "up_proj") for names in here if names[0].endswith("down_proj")}
        if "v_proj" in self.read:
            writers |= {names: "self_attn.v_proj" for names in here if names == ("self_attn.o_proj",)}
        of_experts = expert_feeders(block.get_submodule("mlp"), "mlp", "post_attention_layernorm")
        return {**producers(block, norms, writers), **of_experts}

    def empty_(self, block: nn.Module, kind: Kind) -> None:
        """Put a module that adds nothing in the sub-layer's place and an identity in its norm's."""
        if kind == Kind.ATTENTION:
            block.self_attn, block.input_layernorm = NoAttention(), nn.Identity()
        elif kind == Kind.MLP:
            block.mlp, block.post_attention_layernorm = NoExperts() if self.gives_scores else NoMlp(), nn.Identity()
        else:
            raise ValueError(f"only an attention or an mlp can be emptied, got {kind}")

    def sync_config_(self, model: PreTrainedModel) -> None:
        """Set config and shape fields to what the parameters are, and give each attention its cache slot."""
        config, layers = model.config, self.blocks(model)
        shapes, mixtures = self._read(model)
        norm = model.get_submodule("model.norm")
        config.hidden_size, config.rms_norm_eps = len(norm.get_parameter("weight")), norm.variance_epsilon
        config.num_hidden_layers = len(layers)
        if not self.heads_stay and (present := [i for i, shape in enumerate(shapes) if shape.kv_heads]):
            config.head_dim = int(layers[present[0]].get_submodule("self_attn").head_dim)  # pyright: ignore[reportArgumentType]
            config.num_attention_heads = max(shape.query_heads for shape in shapes)
            config.num_key_value_heads = max(shape.kv_heads for shape in shapes)
        dense = [i for i, shape in enumerate(shapes) if shape.channels and not shape.experts]
        if mixtures:
            count = max(mixture.experts for mixture in mixtures.values())
            for field in _COUNTS:
                if hasattr(config, field):
                    setattr(config, field, count)
                if hasattr(model, field):
                    setattr(model, field, count)
            setattr(config, self.width, max(mixture.width for mixture in mixtures.values()))
            if not all(fits_grouped(mixture, model) for mixture in mixtures.values()):
                config._experts_implementation = "eager"
        if dense and self.width != "intermediate_size":
            config.intermediate_size = max(shapes[i].channels for i in dense)
        if hasattr(config, "mlp_only_layers"):
            config.mlp_only_layers, config.decoder_sparse_step = dense, 1
        if hasattr(config, "first_k_dense_replace"):
            config.first_k_dense_replace = next((i for i, shape in enumerate(shapes) if shape.experts), len(shapes))
        kinds = [
            getattr(layer.self_attn, "layer_type", None) or "" if shape.kv_heads else None
            for layer, shape in zip(layers, shapes, strict=True)
        ]
        labels, slots = cache_slots(kinds)
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = [label or "full_attention" for label in labels]
        for i, (layer, shape, slot) in enumerate(zip(layers, shapes, slots, strict=True)):
            if slot is not None:
                groups = {} if self.heads_stay else {"num_key_value_groups": shape.query_heads // shape.kv_heads}
                _set_fields_(layer.get_submodule("self_attn"), {"layer_idx": slot} | groups)
            fields = {"hidden_size": config.hidden_size, "hidden_dim": config.hidden_size}
            _set_fields_(layer, fields)
            if i in mixtures:
                mixture = mixtures[i]
                fields |= {"num_experts": mixture.experts, "intermediate_dim": mixture.width}
                for part in ("mlp", f"mlp.{mixture.router}", f"mlp.{EXPERTS}"):
                    _set_fields_(layer.get_submodule(part), fields | {"intermediate_size": mixture.width})
                if mixture.shared:
                    shared = layer.get_submodule(f"mlp.{mixture.shared}")
                    _set_fields_(shared, {"hidden_size": config.hidden_size})
            elif shape.channels:
                _set_fields_(layer.get_submodule("mlp"), fields | {"intermediate_size": shape.channels})

    def _hidden(
        self, model: PreTrainedModel, mixtures: dict[int, Mixture], attentions: Collection[int], ffns: dict[int, Gate]
    ) -> Axis:
        """One dimension of the stream a unit."""
        written = [f"{_LAYERS}.{i}.self_attn.o_proj" for i in attentions]
        written += [gate.module for i, gate in ffns.items() if i not in mixtures]
        read = {f"{_LAYERS}.{i}.self_attn.{name}" for i in attentions for name in self.read}
        read |= {f"{_LAYERS}.{i}.mlp.{name}" for i in ffns if i not in mixtures for name in _FFN[:2]}
        norms = {name for name, _ in model.named_modules() if name.endswith(("input_layernorm", "attention_layernorm"))}
        axis = hidden_axis(model, written, read, norms, "model.norm")
        slices = (piece for mixture in mixtures.values() for piece in mixture.stream())
        gates = (replace(ffns[i], unit=None) for i in mixtures)
        return replace(axis, slices=(*axis.slices, *slices), gates=(*axis.gates, *gates))

    def _checked(self, model: PreTrainedModel) -> tuple[list[LayerShape], dict[int, Mixture]]:
        """What is there. Raises ArchError where the config says something else."""
        shapes, mixtures = self._read(model)
        config, embedding = model.config, tuple(model.get_parameter("model.embed_tokens.weight").shape)
        facts = {
            "num_hidden_layers": (config.num_hidden_layers, len(shapes)),
            "vocab_size, hidden_size": ((config.vocab_size, config.hidden_size), embedding),
        }
        for field, (said, found) in facts.items():
            if said != found:
                raise ArchError(
                    f"the config says {field}={said}, the modules say {found}; load the model and its config from one"
                    " checkpoint"
                )
        return shapes, mixtures

    def _read(self, model: PreTrainedModel) -> tuple[list[LayerShape], dict[int, Mixture]]:
        """The widths of each layer, and the mixtures by layer."""
        hidden = model.get_parameter("model.norm.weight").shape[0]
        shapes: list[LayerShape] = []
        mixtures: dict[int, Mixture] = {}
        known = {"model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"}
        for i, layer in enumerate(self.blocks(model)):
            where, heads, kv_heads, channels = f"{_LAYERS}.{i}", 0, 0, 0
            if not is_absent(layer.get_submodule("self_attn")):
                heads, kv_heads = self._heads(layer.get_submodule("self_attn"))
                known |= {f"{where}.{name}" for name, _ in _attention_parameters(layer, self)}
            if not is_absent(layer.get_submodule("mlp")):
                known.add(f"{where}.post_attention_layernorm.weight")
                if (mixture := mixture_of(model, f"{where}.mlp", hidden)) is not None:
                    mixtures[i], channels = mixture, mixture.width
                    known |= {f"{where}.mlp.{name}" for name in mixture.tensors}
                else:
                    channels = layer.get_parameter("mlp.gate_proj.weight").shape[0]
                    known |= {f"{where}.mlp.{name}.{tensor}" for name in _FFN for tensor in ("weight", "bias")}
            shapes.append(LayerShape(heads, kv_heads, channels, mixtures[i].experts if i in mixtures else 0))
        for name, _ in model.named_parameters():
            if name not in known:
                raise ArchError(
                    f"parameter '{name}' is not part of a plain {self.name}; merge adapters and pass the unwrapped"
                    " model"
                )
        return shapes, mixtures

    def _heads(self, attention: nn.Module) -> tuple[int, int]:
        """How many query heads and key/value heads an attention has."""
        if "q_proj" in self.read and "k_proj" in self.read:
            width = int(attention.head_dim)  # pyright: ignore[reportArgumentType]
            q, k = (attention.get_parameter(f"{name}.weight") for name in ("q_proj", "k_proj"))
            return q.shape[0] // width, k.shape[0] // width
        heads = int(attention.num_heads)  # pyright: ignore[reportArgumentType]
        return heads, heads


def fits_grouped(mixture: Mixture, model: PreTrainedModel) -> bool:
    """Whether the product that transformers takes by default for stacked experts takes these: rows of 16 bytes."""
    itemsize = model.get_parameter(mixture.down).element_size()
    return not any(width * itemsize % 16 for width in (mixture.width, mixture.hidden))


def _ffn_gate(i: int, mixture: Mixture | None) -> Gate:
    """Where the output of a layer's FFN is multiplied."""
    if mixture is None:
        return Gate(f"{_LAYERS}.{i}.mlp.down_proj", "output", unit=i)
    return Gate(mixture.where, "output", unit=i, folds=mixture.folds())


def _attention_parameters(layer: nn.Module, arch: MoeDecoder) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a layer's attention that its family has, and of its norm."""
    linears = (*arch.read, *arch.inner, "o_proj")
    return [
        (name, parameter)
        for name, parameter in layer.named_parameters()
        if name.startswith("input_layernorm.")
        or (
            name.startswith("self_attn.")
            and (name.split(".")[1] in linears or "norm" in name or name.endswith("sinks"))
        )
    ]


def _set_fields_(module: nn.Module, fields: dict[str, int]) -> None:
    """Set those fields that the module has."""
    for name, value in fields.items():
        if hasattr(module, name):
            setattr(module, name, value)
