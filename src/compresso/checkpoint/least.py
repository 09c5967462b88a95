"""What the numbers of a config must at least be: a count of 0 builds a model with tensors of no entries, and fails far
from the config that asked for it.

Numbers of a mixture of experts are looked at together, since each alone may be anything: a token takes at least one
expert and at most all. Some configs say with 0 experts that a model has none of them; those of the families that are
described here cannot.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from compresso.arch.base import arch_for
from compresso.arch.moe_config import COUNTS, PER_TOKEN
from compresso.arch.moe_shape import MoeFamily
from compresso.arch.routers import ALL, METHOD
from compresso.errors import ArchError, CheckpointError

_CHECK = "Check the config."
_ONE = re.compile(
    r"^(num_(hidden_)?layers|n_layers?|num_encoder_blocks"
    r"|num_((attention|key_value|kv)_)?heads|n_heads?|head_dim|v_head_dim"
    r"|hidden_sizes?|n_embd|d_model|dim|word_embed_proj_dim"
    r"|(moe_|dense_)?intermediate_size|n_inner|hidden_dim|ffn_dim|d_ff"
    r"|vocab_size|max_position_embeddings|n_positions|num_channels|image_size|patch_size)$"
)
"""Counts that are at least 1, where a config has them at all; others may be 0 or -1 where a model has none."""
_FREE = {"head_dim": "qk_rope_head_dim", "intermediate_size": "moe_intermediate_size"}
"""Of those, what may be 0 beside another field: the width of heads that follows from it, dense FFNs beside mixtures."""
_SHARED, _GROUPS, _OF_GROUPS = "n_shared_experts", "n_group", "topk_group"


def check_least(path: Path, shown: str, name: str, value: object, beside: Mapping[str, object]) -> None:
    """Raise CheckpointError if a number, or one of a list, is below what its name can count.

    Args:
        path: the file that was read.
        shown: the field, with what it lies in.
        name, value: of the field.
        beside: the object that it lies in.
    """
    if not _ONE.search(name):
        return
    least = 0 if _FREE.get(name, name) in beside and name in _FREE else 1
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, int | float) and not isinstance(one, bool) and one < least:
            raise CheckpointError(
                f"{path}: {shown} is {value if value is not one else f'{one:,}'}; wanted at least {least}. {_CHECK}"
            )


def check_mixture(path: Path, config: PreTrainedConfig, data: Mapping[str, Any]) -> None:
    """Raise CheckpointError if a config's numbers of experts do not fit each other.

    Args:
        path: the file that was read.
        config: made of it, with the numbers that its class has by default.
        data: what the file holds, for the names of its fields.
    """
    for own in (config, *(one for one in vars(config).values() if isinstance(one, PreTrainedConfig))):
        count, per_token = _field(own, COUNTS, data), _field(own, PER_TOKEN, data)
        if count is None or per_token is None:
            continue
        (count, experts), (per_token, taken) = count, per_token
        if not experts and not taken and not _has_mixtures(own):
            continue
        if experts < 1:
            raise CheckpointError(f"{path}: {count} is {experts:,}; wanted at least 1. {_CHECK}")
        if not 1 <= taken <= experts:
            raise CheckpointError(f"{path}: {per_token} is {taken:,}; wanted 1 to {experts:,}, its {count}. {_CHECK}")
        if _has_mixtures(own):
            shared = getattr(own, _SHARED, 1)
            if isinstance(shared, int) and shared < 1:
                raise CheckpointError(f"{path}: {_SHARED} is {shared:,}; wanted at least 1. {_CHECK}")
            if getattr(own, METHOD, None) != ALL:
                _check_groups(path, own, experts, taken)


def _check_groups(path: Path, config: PreTrainedConfig, experts: int, taken: int) -> None:
    """Raise CheckpointError if a token cannot choose its experts from some of equal groups."""
    groups, chosen = getattr(config, _GROUPS, None), getattr(config, _OF_GROUPS, None)
    if groups is None or chosen is None:
        return
    if groups < 1 or experts % groups:
        raise CheckpointError(
            f"{path}: {_GROUPS} is {groups:,}; wanted at least 1, and a divisor of its {experts:,} experts. {_CHECK}"
        )
    if not 1 <= chosen <= groups or taken > chosen * (experts // groups):
        raise CheckpointError(
            f"{path}: {_OF_GROUPS} is {chosen:,}; wanted 1 to {groups:,}, its {_GROUPS}, and room for {taken:,} experts"
            f" a token in groups of {experts // groups:,}. {_CHECK}"
        )


def _has_mixtures(config: PreTrainedConfig) -> bool:
    """Whether a config is of a family that is described as one with mixtures of experts."""
    try:
        return isinstance(arch_for(config), MoeFamily)
    except ArchError:
        return False


def _field(config: PreTrainedConfig, names: tuple[str, ...], data: Mapping[str, Any]) -> tuple[str, int] | None:
    """A number, and what the file calls it, or else the class; None if a config has no such number."""
    name = next((one for one in names if type(vars(config).get(one)) is int), None)
    if name is None:
        return None
    called = [one for one, own in (config.attribute_map or {}).items() if own == name and one in data]
    return (name if name in data or not called else called[0]), vars(config)[name]
