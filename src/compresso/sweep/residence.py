"""Where a model's weights are: in memory, or on disk and read when they are asked for."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel


class Residence(Protocol):
    """What differs between a model in memory and one on disk."""

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """All weights by name."""
        ...

    def whole(self) -> AbstractContextManager[None]:
        """Within the context the model can be called."""
        ...


@dataclass(frozen=True)
class InMemory:
    """A model that holds its weights."""

    model: PreTrainedModel

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.model.device

    def tensors(self) -> Mapping[str, Tensor]:
        """Its state, live."""
        return self.model.state_dict()

    def whole(self) -> AbstractContextManager[None]:
        """It can be called in any case."""
        return nullcontext()
