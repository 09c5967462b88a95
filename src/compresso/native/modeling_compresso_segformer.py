"""SegFormer with layers of unequal widths, as a checkpoint of transformers.

This one file is all that such a checkpoint needs beside its weights: it lies in the checkpoint too, so it imports
transformers, torch and huggingface_hub only. The stages, layers and heads are transformers' own, with other widths, and
tensors have the names that these give them.

Beside the fields of a stock config, which has one number a stage, this one says of each layer how many heads and FFN
units it has (0: no attention, no FFN, and no norm before it), how wide a head is, whatever the stage's feature maps
are, and how many channels the head's linears write. Fields that follow from these (`num_attention_heads`, `mlp_ratios`)
are not read.
"""
# pyright: reportIncompatibleMethodOverride=false

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.models.segformer.configuration_segformer import SegformerConfig
from transformers.models.segformer.modeling_segformer import (
    SegformerDecodeHead,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
    SegformerLayer,
    SegformerModel,
    SegformerPreTrainedModel,
)


@strict
class CompressoSegformerConfig(SegformerConfig):
    """`heads_by_layer` and `channels_by_layer`: by stage, then by layer; `head_dims`: entries of a head, by stage;
    `projected_channels`: of each of the head's linears. Where None, what a stock config has.
    """

    model_type = "compresso_segformer"
    heads_by_layer: list[list[int]] | None = None
    channels_by_layer: list[list[int]] | None = None
    head_dims: list[int] | None = None
    projected_channels: int | None = None

    def __post_init__(self, **kwargs: object) -> None:
        """Fill in what was left out. Raises ValueError for numbers that do not fit together."""
        super().__post_init__(**kwargs)
        widths, depths, heads, ratios = self.hidden_sizes, self.depths, self.num_attention_heads, self.mlp_ratios
        stages = range(self.num_encoder_blocks)
        given = (widths, depths, heads, ratios, self.sr_ratios, self.patch_sizes, self.strides)
        if not all(len(of) == len(stages) for of in given) or min(*widths, *heads) < 1:
            raise ValueError(f"num_encoder_blocks={self.num_encoder_blocks}: wanted as many of all that stages have.")
        self.head_dims = self.head_dims or [widths[i] // heads[i] for i in stages]
        self.heads_by_layer = self.heads_by_layer or [[heads[i]] * depths[i] for i in stages]
        self.channels_by_layer = self.channels_by_layer or [[int(widths[i] * ratios[i])] * depths[i] for i in stages]
        self.projected_channels = self.projected_channels or self.decoder_hidden_size
        for name, of in (("heads_by_layer", self.heads_by_layer), ("channels_by_layer", self.channels_by_layer)):
            if [len(one) for one in of] != list(depths) or any(number < 0 for one in of for number in one):
                raise ValueError(f"{name}={of}: wanted a number for each of {list(depths)} layers, at least 0.")
        if len(self.head_dims) != len(stages) or min(*self.head_dims, self.projected_channels) < 1:
            raise ValueError(f"head_dims={self.head_dims}: wanted one for each of {len(stages)} stages, at least 1.")


class NoAttention(nn.Module):
    """In the place of an attention that is not there."""

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        return hidden_states.new_zeros(()).expand_as(hidden_states), None


class NoMlp(nn.Module):
    """In the place of an FFN that is not there."""

    def forward(self, hidden_states: Tensor, *_: object) -> Tensor:
        return hidden_states.new_zeros(()).expand_as(hidden_states)


def set_widths_(layer: SegformerLayer, hidden: int, heads: int, head_dim: int, channels: int) -> None:
    """Give a stock layer linears and convolutions of these widths, with weights that nobody has drawn yet."""
    if heads:
        attention = layer.attention
        attention.num_attention_heads, attention.head_dim = heads, head_dim
        attention.scaling = head_dim**-0.5
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(attention, name, nn.Linear(hidden, heads * head_dim))
        attention.o_proj = nn.Linear(heads * head_dim, hidden)
    else:
        layer.attention, layer.layernorm_before = NoAttention(), nn.Identity()  # type: ignore[assignment]
    if channels:
        mlp = layer.mlp
        mlp.fc1, mlp.fc2 = nn.Linear(hidden, channels), nn.Linear(channels, hidden)
        mlp.dwconv.dwconv = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels)
    else:
        layer.mlp, layer.layernorm_after = NoMlp(), nn.Identity()  # type: ignore[assignment]


class CompressoSegformerPreTrainedModel(SegformerPreTrainedModel):
    """Its config."""

    config_class = CompressoSegformerConfig


class CompressoSegformerModel(CompressoSegformerPreTrainedModel, SegformerModel):
    """The model without a head."""

    def __init__(self, config: CompressoSegformerConfig) -> None:
        super().__init__(config)
        assert config.heads_by_layer and config.channels_by_layer and config.head_dims
        for i, stage in enumerate(self.stages):
            layers: list[SegformerLayer] = [*stage.blocks]  # type: ignore[misc]
            numbers = zip(layers, config.heads_by_layer[i], config.channels_by_layer[i], strict=True)
            for layer, heads, channels in numbers:
                set_widths_(layer, config.hidden_sizes[i], heads, config.head_dims[i], channels)
        self.post_init()


class CompressoSegformerDecodeHead(SegformerDecodeHead):
    """The head for segmentation, whose linears need not be as wide as what it fuses them to."""

    def __init__(self, config: CompressoSegformerConfig) -> None:
        super().__init__(config)
        assert config.projected_channels
        for width, linear in zip(config.hidden_sizes, self.linear_projections, strict=True):
            linear.proj = nn.Linear(width, config.projected_channels)
        wide = config.projected_channels * config.num_encoder_blocks
        self.linear_fuse = nn.Conv2d(wide, config.decoder_hidden_size, kernel_size=1, bias=False)


class CompressoSegformerForSemanticSegmentation(CompressoSegformerPreTrainedModel, SegformerForSemanticSegmentation):
    """The segmenter."""

    def __init__(self, config: CompressoSegformerConfig) -> None:
        SegformerPreTrainedModel.__init__(self, config)
        self.segformer = CompressoSegformerModel(config)
        self.decode_head = CompressoSegformerDecodeHead(config)
        self.post_init()


class CompressoSegformerForImageClassification(CompressoSegformerPreTrainedModel, SegformerForImageClassification):
    """The classifier."""

    def __init__(self, config: CompressoSegformerConfig) -> None:
        SegformerPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.segformer = CompressoSegformerModel(config)
        self.classifier = nn.Linear(config.hidden_sizes[-1], int(config.num_labels or 0))
        self.post_init()
