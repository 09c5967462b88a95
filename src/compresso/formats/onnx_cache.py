"""The key/value cache of a graph: what its tensors are called, and how wide they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresso.arch.base import LayerShape


@dataclass(frozen=True, slots=True)
class Cache:
    """How wide the key/value cache of a model is.

    Args:
        heads: of each attention, in order.
        key, value: widths of one.
    """

    heads: tuple[int, ...]
    key: int
    value: int

    def fields(self) -> dict[str, Any]:
        """As the config of a written folder says it; one width where there is one."""
        own = {} if self.key == self.value else {"value_dim": self.value}
        return {"heads": list(self.heads), "head_dim": self.key, **own}

    @classmethod
    def of_fields(cls, fields: Mapping[str, Any]) -> "Cache":
        """What `fields` said."""
        return cls(tuple(fields["heads"]), fields["head_dim"], fields.get("value_dim", fields["head_dim"]))

    def zeros(self, batch: int, past: int) -> list[Tensor]:
        """Key and value [batch, heads, past, width] of each attention, in order."""
        return [torch.zeros(batch, heads, past, width) for heads in self.heads for width in (self.key, self.value)]


def cache_of(model: PreTrainedModel, shapes: Sequence[LayerShape]) -> Cache:
    """What the attentions of a model keep, given the widths of its layers; transformers keeps MLA's compressed."""
    heads = tuple(shape.kv_heads for shape in shapes if shape.kv_heads)
    if (rank := getattr(model.config, "kv_lora_rank", None)) is not None:
        return Cache((1,) * len(heads), int(rank), int(model.config.qk_rope_head_dim))
    width = head_dim(model)
    return Cache(heads, width, width)


def head_dim(model: PreTrainedModel) -> int:
    """Width of a key or value."""
    config = model.config
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def cache_names(slots: int, prefix: str) -> list[str]:
    """Names of the cache's tensors, in order.

    >>> cache_names(1, "present")
    ['present.0.key', 'present.0.value']
    """
    return [f"{prefix}.{slot}.{part}" for slot in range(slots) for part in ("key", "value")]
