"""Recomputing activations in the backward pass, to save memory: transformers renamed the switch, and both names are in
use.
"""

from typing import Any

from transformers import PreTrainedModel


def recompute_(model: PreTrainedModel, on: bool) -> None:
    """Turn the recomputation of activations on or off; called `gradient_checkpointing_*` up to transformers 5.17."""
    live: Any = model
    new = hasattr(live, "activation_checkpointing_enable")
    if on:
        (live.activation_checkpointing_enable if new else live.gradient_checkpointing_enable)({"use_reentrant": False})
    else:
        (live.activation_checkpointing_disable if new else live.gradient_checkpointing_disable)()
