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
from compresso.arch.expert_feeders import expert_feeders
from compresso.arch.mixture import EXPERTS, SHARED, Mixture
from compresso.arch.moe_config import sync_moe_
from compresso.arch.moe_shape import FFN, LAYERS, MoeFamily, checked_shapes, layers_of
from compresso.arch.producers import Producers, producers
from compresso.arch.stream import hidden_axis, is_norm
from compresso.arch.vocabulary import vocabulary_axis
from compresso.core.axis import Axis, Gate, Kind, Slice
from compresso.core.cost import Group, Weight


@dataclass(frozen=True, slots=True)
class MoeDecoder(MoeFamily):
    """An `Arch` for decoders of the form in this file's header, of the family that its fields say."""

    def matches(self, config: PreTrainedConfig) -> bool:
        """Whether the config has this model type."""
        return config.model_type == self.name

    def blocks(self, model: PreTrainedModel) -> nn.ModuleList:
        """`model.layers`. Raises ArchError if the model has none, or no head."""
        return layers_of(model)

    def shapes(self, model: PreTrainedModel) -> list[LayerShape]:
        """The widths of each layer.

        Raises:
            ArchError: the modules are not what the config says.
        """
        return checked_shapes(self, model)[0]

    def axes(self, model: PreTrainedModel) -> tuple[Axis, ...]:
        """`layers.{i}.heads` (where heads can leave), `.channels` of dense layers, `.experts` and `.expert_channels` of
        the others, then `hidden`, `layers`, `attention`, `mlp`, `vocab`.
        """
        shapes, mixtures = checked_shapes(self, model)
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
            i: Gate(f"{LAYERS}.{i}.self_attn.o_proj", "output", unit=i) for i, s in enumerate(shapes) if s.kv_heads
        }
        ffns = {i: _ffn_gate(i, mixtures.get(i)) for i, shape in enumerate(shapes) if shape.channels}
        axes.append(self._hidden(model, mixtures, attentions, ffns))
        for name, kind, parts, sites in (
            ("layers", Kind.LAYER, ("",), (attentions, ffns)),
            ("attention", Kind.ATTENTION, ("self_attn.", "input_layernorm."), (attentions,)),
            ("mlp", Kind.MLP, ("mlp.", "post_attention_layernorm."), (ffns,)),
        ):
            there = range(len(shapes)) if kind == Kind.LAYER else sites[0]
            prefixes = {i: tuple(f"{LAYERS}.{i}.{part}" for part in parts) for i in there}
            slices = tuple(
                Slice(p, 0, unit=i)
                for i, of in prefixes.items()
                for p, _ in model.get_submodule(f"{LAYERS}.{i}").named_parameters(prefix=f"{LAYERS}.{i}")
                if p.startswith(of)
            )
            gates = tuple(replace(gate, unit=i) for site in sites for i, gate in site.items())
            axes.append(Axis(name, kind, len(shapes), slices, gates, LAYERS))
        return (*axes, vocabulary_axis(model))

    def weights(self, model: PreTrainedModel) -> tuple[Weight, ...]:
        """Every parameter, tied ones once; of experts the multiplications of those that a token takes."""
        mixtures = checked_shapes(self, model)[1]
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
            elif not name.startswith(f"{LAYERS}."):
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
                gate, up, down = (f"mlp.{inside}{name}" for name in FFN)
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
        sync_moe_(self, model)

    def _hidden(
        self, model: PreTrainedModel, mixtures: dict[int, Mixture], attentions: Collection[int], ffns: dict[int, Gate]
    ) -> Axis:
        """One dimension of the stream a unit."""
        written = [f"{LAYERS}.{i}.self_attn.o_proj" for i in attentions]
        written += [gate.module for i, gate in ffns.items() if i not in mixtures]
        read = {f"{LAYERS}.{i}.self_attn.{name}" for i in attentions for name in self.read}
        read |= {f"{LAYERS}.{i}.mlp.{name}" for i in ffns if i not in mixtures for name in FFN[:2]}
        norms = {name for name, _ in model.named_modules() if name.endswith(("input_layernorm", "attention_layernorm"))}
        axis = hidden_axis(model, written, read, norms, "model.norm")
        slices = (piece for mixture in mixtures.values() for piece in mixture.stream())
        gates = (replace(ffns[i], unit=None) for i in mixtures)
        return replace(axis, slices=(*axis.slices, *slices), gates=(*axis.gates, *gates))


def _ffn_gate(i: int, mixture: Mixture | None) -> Gate:
    """Where the output of a layer's FFN is multiplied."""
    if mixture is None:
        return Gate(f"{LAYERS}.{i}.mlp.down_proj", "output", unit=i)
    return Gate(mixture.where, "output", unit=i, folds=mixture.folds())
