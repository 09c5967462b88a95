"""MobileViT (arXiv 2110.02178): inverted residuals and small transformers over feature maps, as a bare model, with a
classifier, with DeepLabV3's head, or under the pyramid of arXiv 2309.02617 (`arch/mobilevit_pyramid.py`).

    stage  = inverted residuals, or one of them, a 3 x 3 convolution, a transformer over patches, and a fusion
    block  = 1 x 1 convolution (wide), 3 x 3 convolution of each channel by itself, 1 x 1 convolution (narrow); each
             with a batch norm

Axes: `stages.{i}.{j}.wide`, the channels inside an inverted residual: rows of the first convolution, all of a channel's
own 3 x 3, columns of the last; `stages.{i}.layers.{k}.channels`, units of a transformer's FFN; `stages.{i}.features`,
channels of a stage's feature maps, one index set for all that a residual sum adds and for what a fusion puts side by
side; `features`, what the classifier reads.

Masks lie where channels are read, behind batch norm and activation. So what a batch norm makes of a channel that is 0
before it, act(bias - mean * weight / deviation), leaves with the channel and nothing has to be folded into a next bias;
a mask on weights alone, as the code of arXiv 2309.02617 has it, would let it through. Whose statistics leave with a
channel are the batch norms' own (`edit/shrink.py`).

Heads stay: the config has one count for transformers of three widths. It has one `expand_ratio` and one `mlp_ratio`,
too, so that only a result with these in common is written. Multiply-accumulates are those of one picture of the
config's size, every convolution and linear; scores of attention are not counted, as elsewhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.mobilevit.modeling_mobilevit import make_divisible

from compresso.arch.base import LayerShape, register
from compresso.arch.mobilevit_pyramid import (
    HEAD,
    LEVELS,
    UNDER_PYRAMID,
    has_pyramid,
    head_axes,
    head_places,
    level_readers,
    level_writers,
    sync_head_,
)
from compresso.arch.places import behind, weights_at
from compresso.arch.producers import Producers
from compresso.core.axis import Axis, Gate, Kind, Slice
from compresso.core.cost import Weight
from compresso.errors import ArchError

_EXPANDED, _EACH, _REDUCED = "expand_1x1", "conv_3x3", "reduce_1x1"


@dataclass
class _Features:
    """The channels of feature maps that one index set describes.

    Args:
        name: of the axis.
        writers: layers (convolution, batch norm) that write all of them.
        readers: convolutions or linears that read them, and where the first one lies in what these read.
    """

    name: str
    writers: list[str] = field(default_factory=list[str])
    readers: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])


@dataclass(frozen=True, slots=True)
class MobileViT:
    """An `Arch` for MobileViT."""

    name: str = "mobilevit"

    def matches(self, config: PreTrainedConfig) -> bool:
        """Whether the config has this model type, or ours of a pyramid over it."""
        return config.model_type in (self.name, UNDER_PYRAMID)

    def blocks(self, model: PreTrainedModel) -> nn.ModuleList:
        """The stages, in order."""
        stages = model.get_submodule(self._body(model) + "encoder.layer")
        assert isinstance(stages, nn.ModuleList)
        return stages

    def shapes(self, model: PreTrainedModel) -> list[LayerShape]:
        """None: its stages are no decoder layers; `axes` says how wide they are."""
        return []

    def axes(self, model: PreTrainedModel) -> tuple[Axis, ...]:
        """The axes of this file's header."""
        axes: list[Axis] = []
        for place, block in self._residuals(model):
            axes.append(self._wide(model, f"stages.{place}.wide", block))
        for i, transformer in self._transformers(model):
            for k, _ in enumerate(model.get_submodule(transformer).children()):
                axes.append(self._ffn(model, f"stages.{i}.layers.{k}.channels", f"{transformer}.{k}"))
        axes += [self._features_axis(model, one) for one in self._features(model) if one.readers]
        axes += head_axes(model) if has_pyramid(model) else []
        return tuple(axes)

    def weights(self, model: PreTrainedModel) -> tuple[Weight, ...]:
        """Every parameter, with the places of one picture at which it multiplies."""
        return weights_at(model, self._places(model), (self._body(model) + "encoder.", f"{HEAD}."))

    def linear_groups(self, block: nn.Module) -> tuple[tuple[str, ...], ...]:
        """None: its linears lie in transformers inside of stages, and no sweep goes through those."""
        return ()

    def producers(self, block: nn.Module) -> Producers:
        """None."""
        return {}

    def empty_(self, block: nn.Module, kind: Kind) -> None:
        """Nothing of a stage can be left out whole. Raises ArchError."""
        raise ArchError(f"no {kind} of a stage of MobileViT can be left out whole; keep at least one unit of each axis")

    def sync_config_(self, model: PreTrainedModel) -> None:
        """Set the config to what the modules are, as far as it has fields for it."""
        body, config = self._body(model), model.config
        sizes = [_weight(model, f"{body}conv_stem.convolution").shape[0]]
        for stage in self.blocks(model):
            last = [module for name, module in stage.named_modules() if name.endswith(("reduce_1x1", "fusion"))][-1]
            sizes.append(last.get_submodule("convolution").get_parameter("weight").shape[0])
        exp = dict(model.named_modules()).get(f"{body}conv_1x1_exp.convolution")
        sizes.append(config.neck_hidden_sizes[-1] if exp is None else exp.get_parameter("weight").shape[0])
        config.neck_hidden_sizes = [int(size) for size in sizes]
        wide = [_io(model, block, _EXPANDED) for _, block in self._residuals(model)]
        ratio = _common([_divisible(given, out) for given, out in wide], config.expand_ratio)
        if all(make_divisible(round(given * ratio), 8) == out for given, out in wide):
            config.expand_ratio = ratio
        ffns = [
            tuple(layer.get_submodule("intermediate.dense").get_parameter("weight").shape[::-1])
            for _, transformer in self._transformers(model)
            for layer in model.get_submodule(transformer).children()
        ]
        share = _common([(out / given, (out + 1) / given) for given, out in ffns], config.mlp_ratio)
        if all(int(given * share) == out for given, out in ffns):
            config.mlp_ratio = share
        if has_pyramid(model):
            sync_head_(model)

    def _body(self, model: PreTrainedModel) -> str:
        """Where the model without its head lies: "" or a prefix with its dot."""
        prefix = "" if hasattr(model, "encoder") else "mobilevit."
        try:
            model.get_submodule(prefix + "encoder.layer")
        except AttributeError as error:
            raise ArchError(f"{type(model).__name__} has no stages; load it with a stock class of MobileViT") from error
        return prefix

    def _residuals(self, model: PreTrainedModel) -> Iterator[tuple[str, str]]:
        """Every inverted residual: its place among the stages (0.0, 2.down), and its name."""
        body = self._body(model) + "encoder.layer."
        for name, _ in model.named_modules():
            if name.endswith("." + _EXPANDED):
                block = name.removesuffix("." + _EXPANDED)
                inside = block.removeprefix(body).replace("downsampling_layer", "down").replace(".layer.", ".")
                yield inside, block

    def _transformers(self, model: PreTrainedModel) -> Iterator[tuple[int, str]]:
        """The stage and the name of each list of transformer layers."""
        for i, block in enumerate(self.blocks(model)):
            if hasattr(block, "transformer"):
                yield i, f"{self._body(model)}encoder.layer.{i}.transformer.layer"

    def _wide(self, model: PreTrainedModel, name: str, block: str) -> Axis:
        slices = [piece for part in (_EXPANDED, _EACH) for piece in _rows(model, f"{block}.{part}")]
        reader = f"{block}.{_REDUCED}.convolution"
        size = _io(model, block, _EXPANDED)[1]
        gates = (Gate(reader, "input"),)
        return Axis(name, Kind.CHANNEL, size, (*slices, Slice(f"{reader}.weight", 1)), gates, block, min_units=1)

    def _ffn(self, model: PreTrainedModel, name: str, layer: str) -> Axis:
        up, down = f"{layer}.intermediate.dense", f"{layer}.output.dense"
        slices = (*(Slice(f"{up}.{part}", 0) for part in ("weight", "bias")), Slice(f"{down}.weight", 1))
        size = _weight(model, up).shape[0]
        return Axis(name, Kind.CHANNEL, int(size), slices, (Gate(down, "input"),), layer, min_units=1)

    def _features_axis(self, model: PreTrainedModel, features: _Features) -> Axis:
        size = int(_weight(model, f"{features.writers[0]}.convolution").shape[0])
        slices = [piece for layer in features.writers for piece in _rows(model, layer)]
        gates: list[Gate] = []
        for reader, start in features.readers:
            width = int(_weight(model, reader).shape[1])
            slices.append(Slice(f"{reader}.weight", 1, start=start))
            gates.append(Gate(reader, "input", start=start, of=None if width == size else width))
        container = self._body(model) + "encoder"
        return Axis(features.name, Kind.HIDDEN, size, tuple(slices), tuple(gates), container)

    def _features(self, model: PreTrainedModel) -> Iterator[_Features]:
        """Feature maps in the order of computation; the last ones may be read by nobody here, then they stay."""
        body = self._body(model)
        now = _Features("stem.features", [f"{body}conv_stem"])
        found = [now]

        def through(block: str, name: str, now: _Features) -> _Features:
            """What an inverted residual leaves: what it reads, where it adds to it."""
            now.readers.append((f"{block}.{_EXPANDED}.convolution", 0))
            if not model.get_submodule(block).use_residual:
                now = _Features(name)
                found.append(now)
            now.writers.append(f"{block}.{_REDUCED}")
            return now

        def level(stage: int, now: _Features) -> None:
            """What a head reads of a stage, and adds to it."""
            if has_pyramid(model):
                now.writers += level_writers(stage)
                now.readers += [(name, 0) for name in level_readers(model, stage)]

        for i, block in enumerate(self.blocks(model)):
            where, name = f"{body}encoder.layer.{i}", f"stages.{i}.features"
            if not hasattr(block, "transformer"):
                for j, _ in enumerate(block.get_submodule("layer").children()):
                    now = through(f"{where}.layer.{j}", name if j == 0 else f"stages.{i}.{j}.features", now)
                level(i, now)
                continue
            if block.downsampling_layer is not None:
                now = through(f"{where}.downsampling_layer", name, now)
            size = int(_weight(model, f"{where}.conv_kxk.convolution").shape[0])
            now.writers += [f"{where}.{layer}" for layer in ("conv_kxk", "conv_projection", "fusion")]
            now.readers += [(f"{where}.{layer}.convolution", 0) for layer in ("conv_kxk", "conv_1x1")]
            now.readers += [(f"{where}.fusion.convolution", start) for start in (0, size)]
            level(i, now)
        modules = dict(model.named_modules())
        if f"{body}conv_1x1_exp" in modules:
            now.readers.append((f"{body}conv_1x1_exp.convolution", 0))
            if isinstance(modules.get("classifier"), nn.Linear):
                found.append(_Features("features", [f"{body}conv_1x1_exp"], [("classifier", 0)]))
        elif "segmentation_head" in modules:
            aspp = (name for name, module in modules.items() if isinstance(module, nn.Conv2d))
            now.readers += [(name, 0) for name in aspp if name.startswith("segmentation_head.aspp.convs.")]
        elif not has_pyramid(model):
            now.readers.clear()  # the last feature maps are what the model gives
        yield from found

    def _places(self, model: PreTrainedModel) -> dict[str, int]:
        """How many places of one picture each convolution and linear writes."""
        size = model.config.image_size
        here = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        found: dict[str, int] = {}
        body, modules = self._body(model), dict(model.named_modules())
        for name, module in modules.items():  # in the order of computation
            if name.startswith("segmentation_head"):
                pooled = name.startswith("segmentation_head.aspp.convs.") and "conv_1x1" in name
                found[name] = 1 if pooled else here[0] * here[1]
            elif isinstance(module, nn.Conv2d) and not name.startswith(f"{HEAD}."):
                here = behind(module, here)
                found[name] = here[0] * here[1]
            elif isinstance(module, nn.Linear) and name.startswith(f"{body}encoder."):
                patch = int(model.config.patch_size)
                high, wide = (-(-side // patch) * patch for side in here)
                found[name] = high * wide
            elif isinstance(module, nn.Linear):
                found[name] = 1
        if has_pyramid(model):
            last = {i: [name for name in found if name.startswith(f"{body}encoder.layer.{i}.")][-1] for i in LEVELS}
            found |= head_places(model, {i: found[name] for i, name in last.items()})
        return found


def _common(ranges: list[tuple[float, float]], now: float) -> float:
    """A ratio in all half-open ranges: the present one if it is, else the middle of what they share."""
    low, high = max(low for low, _ in ranges), min(high for _, high in ranges)
    return now if low <= now < high else (low + high) / 2


def _divisible(given: int, out: int) -> tuple[float, float]:
    """Ratios whose product with what a convolution reads is rounded to what it writes: to a multiple of 8, the next one
    where that takes off more than a tenth.
    """
    lowest = 0.0 if out == 8 else min(out - 4, (out - 8) / 0.9)
    return lowest / given, min(out + 3.5, out / 0.9 - 0.5) / given  # the product is made whole before


def _io(model: PreTrainedModel, block: str, part: str) -> tuple[int, int]:
    """Channels that a 1 x 1 convolution of a block reads and writes."""
    weight = _weight(model, f"{block}.{part}.convolution")
    return int(weight.shape[1]), int(weight.shape[0])


def _weight(model: PreTrainedModel, module: str) -> Tensor:
    return model.get_submodule(module).get_parameter("weight")


def _rows(model: PreTrainedModel, layer: str) -> list[Slice]:
    """What writes a channel: a convolution's row, and the batch norm's entries."""
    named = model.get_submodule(layer).named_parameters(prefix=layer)
    return [Slice(name, 0) for name, _ in named]


MOBILEVIT = register(MobileViT())
