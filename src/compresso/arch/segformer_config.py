"""What a SegFormer's config says of its widths, set to what its modules are.

A stock config has one number a stage for the depth, the heads and the FFN, and one for the head; a number that does not
say what the modules are is the first layer's, and whoever writes the model finds out. Ours has one for each layer.
"""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from compresso.arch.absent import is_absent


def sync_stock_(model: PreTrainedModel, stages: nn.ModuleList) -> None:
    """Set what a stock config has fields for: sizes, depths, heads, whole ratios, and the head's width.

    stages: of the model.
    """
    config: Any = model.config
    widths, heads, units = widths_of(stages)
    _sync_stages_(config, widths, units)
    config.num_attention_heads = [
        min(next((one for one in of if one), config.num_attention_heads[i]), widths[i]) for i, of in enumerate(heads)
    ]
    config.mlp_ratios = [
        next((one // width for one in of if one and one % width == 0), config.mlp_ratios[i])
        for i, (of, width) in enumerate(zip(units, widths, strict=True))
    ]
    if (fuse := _fuse(model)) is not None:
        config.decoder_hidden_size = int(fuse.get_parameter("weight").shape[0])
    _tell_heads_(stages)


def sync_own_(model: PreTrainedModel, stages: nn.ModuleList) -> None:
    """Set all of what ours says.

    stages: of the model.
    """
    config: Any = model.config
    widths, heads, units = widths_of(stages)
    _sync_stages_(config, widths, units)
    config.heads_by_layer, config.channels_by_layer = heads, units
    config.head_dims = head_dims(stages, config.head_dims)
    if (fuse := _fuse(model)) is not None:
        config.decoder_hidden_size, config.projected_channels = fused_and_projected(fuse, len(stages))
    _tell_heads_(stages)


def widths_of(stages: nn.ModuleList) -> tuple[list[int], list[list[int]], list[list[int]]]:
    """Channels of each stage's feature maps; heads and FFN units of each of its layers, 0 where there is none."""
    widths, heads, units = list[int](), list[list[int]](), list[list[int]]()
    for stage in stages:
        layers = list(stage.get_submodule("blocks").children())
        widths.append(int(stage.get_parameter("patch_embeddings.proj.weight").shape[0]))
        heads.append([_heads(layer.get_submodule("attention")) for layer in layers])
        units.append([_units(layer.get_submodule("mlp")) for layer in layers])
    return widths, heads, units


def head_dims(stages: nn.ModuleList, now: list[int]) -> list[int]:
    """Entries of a head, by stage; what they are `now` where a stage has no attention left."""
    found: list[int] = []
    for i, stage in enumerate(stages):
        attentions = [layer.get_submodule("attention") for layer in stage.get_submodule("blocks").children()]
        found.append(next((head_dim(one) for one in attentions if not is_absent(one)), now[i]))
    return found


def head_dim(attention: nn.Module) -> int:
    """Entries of a head of an attention that is there."""
    return int(attention.head_dim)  # pyright: ignore[reportArgumentType]


def fused_and_projected(fuse: nn.Module, n_stages: int) -> tuple[int, int]:
    """Channels that the head's convolution writes, and those of each stage that it reads."""
    rows, wide = fuse.get_parameter("weight").shape[:2]
    return int(rows), int(wide) // n_stages


def _sync_stages_(config: Any, widths: list[int], units: list[list[int]]) -> None:
    """What both configs say of stages."""
    config.hidden_sizes, config.depths = widths, [len(of) for of in units]


def _fuse(model: PreTrainedModel) -> nn.Module | None:
    """The head's convolution, if there is such a head."""
    return dict(model.named_modules()).get("decode_head.linear_fuse")


def _heads(attention: nn.Module) -> int:
    if is_absent(attention):
        return 0
    return int(attention.get_parameter("o_proj.weight").shape[1]) // head_dim(attention)


def _units(mlp: nn.Module) -> int:
    return 0 if is_absent(mlp) else int(mlp.get_parameter("fc2.weight").shape[1])


def _tell_heads_(stages: nn.ModuleList) -> None:
    """What attentions say of their heads."""
    for stage in stages:
        for layer in stage.get_submodule("blocks").children():
            attention: Any = layer.get_submodule("attention")
            if not is_absent(attention):
                attention.num_attention_heads = _heads(attention)
