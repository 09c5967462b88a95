"""A SegFormer whose layers differ in what a stock config has one number a stage for, as our class that says each."""

import copy
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from compresso.arch.base import arch_for
from compresso.arch.segformer_config import fused_and_projected, head_dims, widths_of
from compresso.checkpoint.reasons import reason_of
from compresso.errors import ExportError
from compresso.formats.layout import REBUILT
from compresso.native import SEGFORMER_CLASSES, segformer_auto_map

_STOCK = ("num_attention_heads", "mlp_ratios")
"""Fields of a stock config that ours does not read."""
_OF_STAGES = ("sr_ratios", "patch_sizes", "strides")
"""Those that say more stages than there are where fewer are asked for and they were left as they are by default."""


def as_unequal(model: PreTrainedModel) -> PreTrainedModel:
    """The same model as ours of unequal layers, with the same tensors, not copies; one of ours is returned as it is.

    Args:
        model: of a stock class, with a config that `sync_config_` has brought in line.

    Raises:
        ExportError: it is none of the three classes that there are, or does not have their tensors.
    """
    if segformer_auto_map(model.config.model_type):
        return model
    config_class, *classes = SEGFORMER_CLASSES["segformer"]
    own = next((one for one in classes if type(model) in one.__mro__), None)
    if own is None:
        raise ExportError(
            f"layout native cannot hold a {type(model).__name__}. Give a bare SegFormer, a classifier or a segmenter."
        )
    stages = arch_for(model.config).blocks(model)
    widths, heads, units = widths_of(stages)
    fields = {key: value for key, value in model.config.to_dict().items() if key not in (*REBUILT, *_STOCK)}
    fields |= {"hidden_sizes": widths, "depths": [len(of) for of in units]}
    fields |= {"heads_by_layer": heads, "channels_by_layer": units, **{name: [1] * len(widths) for name in _STOCK}}
    fields |= {name: list(fields[name])[: len(widths)] for name in _OF_STAGES}
    fields["head_dims"] = head_dims(stages, [1] * len(widths))
    head: Any = dict(model.named_modules()).get("decode_head.linear_fuse")
    if head is not None:
        fields["decoder_hidden_size"], fields["projected_channels"] = fused_and_projected(head, len(stages))
    try:
        config = config_class(**fields)
    except (ValueError, StrictDataclassError) as error:
        raise ExportError(f"layout native cannot hold this segformer: {reason_of(error)}") from error
    with torch.device("meta"):
        made = own._from_config(copy.deepcopy(config), dtype=model.dtype)
    try:
        made.load_state_dict(model.state_dict(), assign=True)
    except RuntimeError as error:
        raise ExportError(
            f"the model does not have its architecture's tensors: {reason_of(error)[:300]}. Merge adapters, and shrink"
            " by a plan."
        ) from error
    return made.train(model.training)
