"""Recomputing activations in the backward pass, to save memory: transformers renamed the switch, and both names are in
use. Blocks are replayed (`edit/replay.py`) where that is known to be right, else by torch's own recomputation.
"""

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from compresso.edit.replay import Replay


def recompute_(model: PreTrainedModel, on: bool) -> None:
    """Turn the recomputation of activations on or off; called `gradient_checkpointing_*` up to transformers 5.17."""
    live: Any = model
    new = hasattr(live, "activation_checkpointing_enable")
    if on:
        (live.activation_checkpointing_enable if new else live.gradient_checkpointing_enable)({"use_reentrant": False})
        for block in live.modules() if isinstance(live, nn.Module) else ():
            if isinstance(block, GradientCheckpointingLayer) and block.gradient_checkpointing:
                usual: Any = block._gradient_checkpointing_func
                setattr(block, "_gradient_checkpointing_func", Replay(block, usual))  # noqa: B010 - no module
    else:
        (live.activation_checkpointing_disable if new else live.gradient_checkpointing_disable)()
