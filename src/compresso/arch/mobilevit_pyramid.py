"""What can be removed from the pyramid head over MobileViT's features (`native/modeling_compresso_pyramid.py`), and at
how many places its convolutions multiply; `arch/mobilevit.py` puts it together with the features.

Axes: `head.pools.{k}`, channels of one pool; `head.pooled`, what the pools' 3 x 3 convolution writes; `head.smooth`,
what the one smoothing convolution writes, read at three places of the fusion; `head.fused`, what the classifier reads.
The width of the pyramid is that of the first level, whose channels are added to the laterals': all of it is one index
set, `stages.1.features`. The config has a field for each, so that every result is written.

Its weights count as a block's: they lose channels as blocks do.
"""

from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel

from compresso.core.axis import Axis, Gate, Kind, Slice

UNDER_PYRAMID = "compresso_mobilevit_pyramid"
"""The model type of such a segmenter, and of its backbone alone."""
HEAD = "pyramid_head"
LEVELS = (1, 2, 3, 4)
"""Stages whose feature maps it reads."""


def has_pyramid(model: PreTrainedModel) -> bool:
    """Whether a model has this head."""
    return any(name == HEAD for name, _ in model.named_children())


def level_readers(model: PreTrainedModel, stage: int) -> list[str]:
    """What of the head reads the feature maps of a stage."""
    if stage == LEVELS[-1]:
        return [*(f"{pool}.convolution" for pool in _children(model, "pools")), f"{HEAD}.bottleneck.parts.0"]
    if stage == LEVELS[0]:
        return [f"{HEAD}.smooth", _children(model, "fusion.parts")[-1]]
    return [f"{HEAD}.laterals.{stage - LEVELS[1]}"] if stage in LEVELS else []


def level_writers(stage: int) -> list[str]:
    """What of the head adds to the feature maps of a stage."""
    return [f"{HEAD}.laterals.{k}" for k in range(len(LEVELS) - 1)] if stage == LEVELS[0] else []


def head_axes(model: PreTrainedModel) -> list[Axis]:
    """The axes of this file's header, in the order of computation."""
    pooled = _children(model, "bottleneck.parts")
    pools = zip(_children(model, "pools"), pooled[1:], strict=True)
    fused, last = _children(model, "fusion.parts"), f"{HEAD}.laterals.{len(LEVELS) - 2}"
    return [
        *(_axis(model, f"head.pools.{k}", [pool], [part]) for k, (pool, part) in enumerate(pools)),
        _axis(model, "head.pooled", [*pooled, f"{HEAD}.bottleneck.normalization"], [last]),
        _axis(model, "head.smooth", [f"{HEAD}.smooth"], fused[:-1]),
        _axis(model, "head.fused", [*fused, f"{HEAD}.fusion.normalization"], [f"{HEAD}.classifier"]),
    ]


def head_places(model: PreTrainedModel, levels: Mapping[int, int]) -> dict[str, int]:
    """How many places of one picture each convolution of the head writes, all of its calls together.

    levels: stage -> places of its feature maps.
    """
    first, *others = (levels[stage] for stage in LEVELS)
    found = {
        f"{HEAD}.pools.{k}.convolution": int(bins) ** 2
        for k, bins in enumerate(model.config.pool_scales)  # pyright: ignore[reportAttributeAccessIssue]
    }
    found |= {f"{HEAD}.laterals.{k}": places for k, places in enumerate(others)}
    found |= {f"{HEAD}.smooth": first + sum(others[:-1]), f"{HEAD}.classifier": first}
    found |= dict.fromkeys(_children(model, "bottleneck.parts"), others[-1])
    return found | dict.fromkeys(_children(model, "fusion.parts"), first)


def sync_head_(model: PreTrainedModel) -> None:
    """Set the config's widths of the head to what its modules are."""
    rows = lambda name: int(_weight(model, name).shape[0])  # noqa: E731
    config = model.config
    config.pool_channels = [rows(f"{pool}.convolution") for pool in _children(model, "pools")]
    config.pooled_channels, config.smooth_channels = rows(f"{HEAD}.bottleneck.parts.0"), rows(f"{HEAD}.smooth")
    config.fused_channels = rows(f"{HEAD}.fusion.parts.0")


def _axis(model: PreTrainedModel, name: str, writers: list[str], readers: list[str]) -> Axis:
    """Channels that convolutions, and a batch norm behind them, write, and that others read."""
    rows = [param for one in writers for param, _ in model.get_submodule(one).named_parameters(prefix=one)]
    slices = (*(Slice(param, 0) for param in rows), *(Slice(f"{reader}.weight", 1) for reader in readers))
    gates = tuple(Gate(reader, "input") for reader in readers)
    size = int(model.get_parameter(rows[0]).shape[0])
    return Axis(name, Kind.CHANNEL, size, slices, gates, HEAD, min_units=1)


def _children(model: PreTrainedModel, name: str) -> list[str]:
    """The names of what lies in a list of the head's modules."""
    where = f"{HEAD}.{name}"
    return [f"{where}.{child}" for child, _ in model.get_submodule(where).named_children()]


def _weight(model: PreTrainedModel, module: str) -> Tensor:
    return model.get_submodule(module).get_parameter("weight")
