"""MobileViT's features under a pooling pyramid and a feature pyramid, for segmentation: the network of the code of
arXiv 2309.02617 (branch swin_v2_b, upernet.py), as a checkpoint of transformers.

This one file is all that such a checkpoint needs beside its weights: it lies in the checkpoint too, so it imports
transformers, torch and huggingface_hub only. The backbone's layers are transformers' own.

    levels    feature maps of the encoder's stages 1 to 4 (the first is 0): 64, 96, 128 and 160 channels
    pools     the last level averaged over 1, 2, 4 and 6 bins a side, each a 1 x 1 convolution to a quarter of its
              channels; stretched back, put behind it, and led by a 3 x 3 convolution to its channels again
    laterals  1 x 1 convolutions of levels 2 to 4 to the channels of level 1
    sums      each level and the stretched next one, through one 3 x 3 convolution
    fusion    the three of these and the last lateral side by side, stretched to level 1: a 3 x 3 convolution
    head      a 3 x 3 convolution to the classes

What is odd in it, and kept: the three convolutions of the sums are one, listed three times (shared weights, counted and
stored once); a sum takes the next level's lateral as it is, not the sum below it; level 1 has no lateral, so that its
width is that of the pyramid; everything inside is stretched with align_corners, the logits (by whoever compares them
with labels) without; two attention heads in transformers of all widths, where mobilevit-small has four.

Departures: a convolution of maps side by side is written as the sum of one of each, which is the same, so that what is
cut of one map is a whole dimension of a tensor. `conv_1x1_exp`, which the published model holds and never runs, is left
out. Logits come in the size of level 1, as transformers' segmenters give them. The gains of batch norms start at 1;
transformers draws MobileViT's near 0, which suits weights that are read and nobody who begins with random numbers.
Every width of the head is in the config, so that it can be cut.
"""
# pyright: reportIncompatibleMethodOverride=false

from itertools import pairwise

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.models.mobilevit.configuration_mobilevit import MobileViTConfig
from transformers.models.mobilevit.modeling_mobilevit import (
    MobileViTConvLayer,
    MobileViTModel,
    MobileViTPreTrainedModel,
)

LEVELS = slice(1, 5)
"""Of the stages' feature maps, those that the head reads."""


@strict
class CompressoMobileViTPyramidConfig(MobileViTConfig):
    """`pool_scales`: bins a side; `pool_channels`: of each, a quarter of the last level's where None;
    `pooled_channels`: behind them, the last level's; `smooth_channels` and `fused_channels`: the first level's.
    """

    model_type = "compresso_mobilevit_pyramid"
    num_attention_heads: int = 2
    pool_scales: list[int] | tuple[int, ...] = (1, 2, 4, 6)
    pool_channels: list[int] | tuple[int, ...] | None = None
    pooled_channels: int | None = None
    smooth_channels: int | None = None
    fused_channels: int | None = None
    head_dropout_prob: float | int = 0.1


def widths_of(config: CompressoMobileViTPyramidConfig) -> tuple[list[int], list[int], int, int, int]:
    """Channels of the levels, of each pool, behind the pools, of the smoothed sums and of what is fused.

    Raises ValueError for pools that do not match or have no channels.
    """
    levels = [int(one) for one in config.neck_hidden_sizes[2:6]]
    scales = list(config.pool_scales)
    pools = list(config.pool_channels or [levels[-1] // max(len(scales), 1)] * len(scales))
    others = (config.pooled_channels or levels[-1], config.smooth_channels or levels[0])
    if len(levels) != 4 or len(pools) != len(scales) or not scales or min(*pools, *scales, *others) < 1:
        raise ValueError(
            f"neck_hidden_sizes {list(config.neck_hidden_sizes)}, pool_scales {scales} and pool_channels {pools}:"
            " wanted seven widths, and as many pools as scales, all at least 1."
        )
    return levels, pools, *others, config.fused_channels or levels[0]


class SideBySide(nn.Module):
    """A 3 x 3 convolution of feature maps side by side, batch norm and ReLU, as the sum of a convolution of each."""

    def __init__(self, inputs: list[int], outputs: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Conv2d(width, outputs, 3, padding=1, bias=False) for width in inputs)
        self.normalization = nn.BatchNorm2d(outputs)

    def forward(self, maps: list[Tensor]) -> Tensor:
        total = sum(part(one) for part, one in zip(self.parts, maps, strict=True))
        return functional.relu(self.normalization(total))


class PyramidHead(nn.Module):
    """From the four levels to logits in the size of the first."""

    def __init__(self, config: CompressoMobileViTPyramidConfig) -> None:
        super().__init__()
        levels, pools, pooled, smooth, fused = widths_of(config)
        first, last = levels[0], levels[-1]
        self.scales = list(config.pool_scales)
        self.pools = nn.ModuleList(
            MobileViTConvLayer(config, last, width, kernel_size=1, use_activation="relu") for width in pools
        )
        self.bottleneck = SideBySide([last, *pools], pooled)
        self.dropout = nn.Dropout2d(config.head_dropout_prob)
        self.laterals = nn.ModuleList(nn.Conv2d(width, first, 1) for width in (*levels[1:-1], pooled))
        self.smooth = nn.Conv2d(first, smooth, 3, padding=1)
        self.fusion = SideBySide([smooth, smooth, smooth, first], fused)
        self.classifier = nn.Conv2d(fused, int(config.num_labels or 0), 3, padding=1)

    def forward(self, levels: list[Tensor]) -> Tensor:
        last = levels[-1]
        pyramid = [last]
        for scale, pool in zip(self.scales, self.pools, strict=True):
            pyramid.append(stretched(pool(functional.adaptive_avg_pool2d(last, scale)), last))
        pooled = self.dropout(self.bottleneck(pyramid))
        read = zip((*levels[1:-1], pooled), self.laterals, strict=True)
        maps = [levels[0], *(lateral(level) for level, lateral in read)]
        sums = [self.smooth(one + stretched(below, one)) for one, below in pairwise(maps)]
        together = [sums[0], *(stretched(one, sums[0]) for one in (*sums[1:], maps[-1]))]
        return self.classifier(self.fusion(together))


def stretched(maps: Tensor, to: Tensor) -> Tensor:
    """Feature maps in the size of others, corner on corner."""
    return functional.interpolate(maps, to.shape[-2:], mode="bilinear", align_corners=True)


class PyramidPreTrainedModel(MobileViTPreTrainedModel):
    """How weights start."""

    config_class = CompressoMobileViTPyramidConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.BatchNorm2d):
            init.ones_(module.weight)


class CompressoMobileViTPyramidModel(PyramidPreTrainedModel, MobileViTModel):
    """The backbone alone."""


class CompressoMobileViTPyramidForSemanticSegmentation(PyramidPreTrainedModel):
    """The segmenter."""

    def __init__(self, config: CompressoMobileViTPyramidConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.mobilevit = CompressoMobileViTPyramidModel(config, expand_output=False)
        self.pyramid_head = PyramidHead(config)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: object,  # what the library gives to any model, such as use_cache
    ) -> SemanticSegmenterOutput | tuple[Tensor, ...]:
        """Logits [batch, classes, h, w] of pixel values [batch, channels, height, width]; with labels [batch, height,
        width] the mean cross-entropy of all that have a class.
        """
        states = self.mobilevit(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
        logits = self.pyramid_head(list(states[LEVELS]))
        loss = None
        if labels is not None:
            wide = functional.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
            loss = functional.cross_entropy(wide, labels, ignore_index=self.config.semantic_loss_ignore_index)
        shown = states if output_hidden_states or self.config.output_hidden_states else None
        if return_dict is False or self.config.return_dict is False:
            return tuple(one for one in (loss, logits, shown) if one is not None)
        return SemanticSegmenterOutput(loss=loss, logits=logits, hidden_states=shown)
