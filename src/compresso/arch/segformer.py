"""SegFormer (arXiv 2105.15203): a hierarchical transformer over feature maps, as a bare model, with a classifier, or
with its all-MLP head for segmentation.

    stage  = overlapping patch embedding (a strided convolution, layer norm), layers, layer norm
    layer  = + o(attention(q, k, v)), + fc2(act(each(fc1))); a layer norm before each; `each` a 3 x 3 convolution of
             each channel by itself; keys and values read feature maps that a strided convolution made smaller
    head   = a linear of each stage, side by side in the size of the first, 1 x 1 convolution, batch norm, classifier

Axes, `{i}` a stage and `{k}` a layer in it: `stages.{i}.layers.{k}.heads` and `.channels` (units of the FFN, with all
of a unit's own 3 x 3); `stages.{i}.features`, channels of a stage's feature maps, one index set for all that its
residual sums add and for the smaller maps of its attentions; `stages.{i}.layers`, `.attention` and `.mlp`, whole layers
and sub-layers; `head.projected`, what the stages' linears write; `head.fused`, what the classifier reads.

Masks lie where units are read: of the FFN behind the convolution of each channel, whose bias a unit that is 0 before it
would still send through the activation; of the head behind the batch norm. Of feature maps they lie on layer norms,
which alone read the stream and take mean and variance over what stays. The four linears of the head keep the same
units, as they lie side by side in one dimension of the convolution; a config has one number for them. A bias of `o` and
`fc2` outlives the last unit, which therefore has to be kept; a sub-layer can leave whole.

Stock configs say one count of heads, a whole multiple for the FFN and a depth a stage; heads are as wide as the stage's
maps allow. What they cannot say is written in our class (`native/modeling_compresso_segformer.py`). They say no size of
pictures either: `image_size` is what preprocessor_config.json says (`checkpoint/stages.py`). Multiply-accumulates are
those of one picture of this size, every convolution and linear; scores of attention are not counted, as elsewhere.
"""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from compresso.arch.absent import NoAttention, NoMixMlp, is_absent
from compresso.arch.base import LayerShape, register
from compresso.arch.parts import Parts
from compresso.arch.places import behind, weights_at
from compresso.arch.producers import Producers
from compresso.arch.segformer_axes import HEAD, features_axis, head_axes, layer_axes, unit_axes
from compresso.arch.segformer_config import sync_own_, sync_stock_
from compresso.core.axis import Axis, Kind
from compresso.core.cost import Weight
from compresso.errors import ArchError

UNEQUAL = "compresso_segformer"
"""The model type of one whose layers differ in what a stock config has one number for."""


PARTS = Parts(
    attention="attention",
    core="attention",
    read=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    write="attention.o_proj",
    ffn="mlp",
    up=("mlp.fc1",),
    down="mlp.fc2",
)
"""Of a layer of a stage, by which adapters find what LLaMA's linears are here."""


@dataclass(frozen=True, slots=True)
class SegFormer:
    """An `Arch` for SegFormer."""

    name: str = "segformer"
    parts: Parts = PARTS

    def matches(self, config: PreTrainedConfig) -> bool:
        """Whether the config has this model type, or ours of unequal layers."""
        return config.model_type in (self.name, UNEQUAL)

    def blocks(self, model: PreTrainedModel) -> nn.ModuleList:
        """The stages, in order."""
        stages = model.get_submodule(self._body(model) + "stages")
        assert isinstance(stages, nn.ModuleList)
        return stages

    def shapes(self, model: PreTrainedModel) -> list[LayerShape]:
        """None: its stages are no decoder layers; `axes` says how wide they are."""
        return []

    def axes(self, model: PreTrainedModel) -> tuple[Axis, ...]:
        """The axes of this file's header."""
        body = self._body(model)
        axes: list[Axis] = []
        for i, stage in enumerate(self.blocks(model)):
            axes += unit_axes(model, body, i)
            if (features := features_axis(model, body, i)) is not None:
                axes.append(features)
            if len(stage.get_submodule("blocks")._modules):
                axes += layer_axes(model, body, i)
        return (*axes, *(head_axes(model) if HEAD in dict(model.named_children()) else ()))

    def weights(self, model: PreTrainedModel) -> tuple[Weight, ...]:
        """Every parameter, with the places of one picture at which it multiplies."""
        return weights_at(model, self._places(model), (self._body(model) + "stages.", f"{HEAD}."))

    def linear_groups(self, block: nn.Module) -> tuple[tuple[str, ...], ...]:
        """None: its linears lie in layers inside of stages, and no sweep goes through those."""
        return ()

    def producers(self, block: nn.Module) -> Producers:
        """None."""
        return {}

    def empty_(self, block: nn.Module, kind: Kind) -> None:
        """Put modules that add nothing in the place of a layer's attention or FFN, and an identity in that of its norm.

        block: a layer, not a stage.
        """
        if kind not in (Kind.ATTENTION, Kind.MLP):
            raise ValueError(f"only an attention or an mlp can be emptied, got {kind}")
        part, norm, nothing = (
            ("attention", "layernorm_before", NoAttention())
            if kind == Kind.ATTENTION
            else ("mlp", "layernorm_after", NoMixMlp())
        )
        block.set_submodule(part, nothing)
        block.set_submodule(norm, nn.Identity())

    def sync_config_(self, model: PreTrainedModel) -> None:
        """Set the config to what the modules are; a stock one as far as it has fields for it."""
        (sync_own_ if model.config.model_type == UNEQUAL else sync_stock_)(model, self.blocks(model))

    def _body(self, model: PreTrainedModel) -> str:
        """Where the model without its head lies: "" or a prefix with its dot. Raises ArchError for no stock class."""
        prefix = "" if hasattr(model, "stages") else "segformer."
        try:
            model.get_submodule(prefix + "stages")
        except AttributeError as error:
            raise ArchError(f"{type(model).__name__} has no stages; load it with a stock class of SegFormer") from error
        if HEAD in dict(model.named_children()) and not model.config.reshape_last_stage:
            raise ArchError(
                "reshape_last_stage=False: SegFormer's head then takes the last feature maps for a square of as many"
                " places as they have channels; set it to true in config.json"
            )
        return prefix

    def _places(self, model: PreTrainedModel) -> dict[str, int]:
        """How many places of one picture each convolution and linear writes. Raises ArchError without a size that will
        do.
        """
        size = getattr(model.config, "image_size", None)
        if size is None:
            raise ArchError(
                "this SegFormer's config has no image_size, by which multiply-accumulates of a picture are counted; add"
                ' it, such as "image_size": [512, 512]'
            )
        here = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        body, found, of_stage = self._body(model), dict[str, int](), list[int]()
        for i, stage in enumerate(self.blocks(model)):
            where = f"{body}stages.{i}"
            here = behind(_conv(stage, "patch_embeddings.proj"), here)
            places = here[0] * here[1]
            of_stage.append(places)
            found[f"{where}.patch_embeddings.proj"] = places
            for k, layer in enumerate(stage.get_submodule("blocks").children()):
                inside = f"{where}.blocks.{k}"
                found |= dict.fromkeys((f"{inside}.mlp.{name}" for name in ("fc1", "dwconv.dwconv", "fc2")), places)
                attention = layer.get_submodule("attention")
                if is_absent(attention):
                    continue
                smaller, name = places, "sequence_reduction.sequence_reduction"
                if hasattr(attention, "sequence_reduction"):
                    sides = behind(_conv(attention, name), here)
                    if min(sides) < 1:
                        raise ArchError(
                            f"image_size={size}: stage {i} has feature maps of {here[0]} x {here[1]} places, and its"
                            f" sr_ratios want at least {_conv(attention, name).kernel_size[0]} a side; give larger"
                            " pictures, or smaller sr_ratios"
                        )
                    smaller = found[f"{inside}.attention.{name}"] = sides[0] * sides[1]
                found |= {f"{inside}.attention.{one}_proj": places for one in ("q", "o")}
                found |= {f"{inside}.attention.{one}_proj": smaller for one in ("k", "v")}
        if HEAD in dict(model.named_children()):
            found |= {f"{HEAD}.linear_projections.{i}.proj": places for i, places in enumerate(of_stage)}
            found |= dict.fromkeys((f"{HEAD}.linear_fuse", f"{HEAD}.classifier"), of_stage[0])
        return found | {"classifier": 1}


def _conv(module: nn.Module, name: str) -> nn.Conv2d:
    found = module.get_submodule(name)
    assert isinstance(found, nn.Conv2d)
    return found


SEGFORMER = register(SegFormer())
