"""A kind of patch that has tensors, for tests: it adds a vector to what a module outputs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso.edit.patch import KINDS, Patch, PatchKind, register

_HOOK = "_tests_shift"


def shift_(model: PreTrainedModel, patch: Patch) -> None:
    def hook(_: nn.Module, __: Any, outputs: Tensor) -> Tensor:
        return outputs + patch.tensors["by"].to(outputs) * patch.params["times"]

    module = model.get_submodule(patch.params["module"])
    vars(module).setdefault(_HOOK, []).append(module.register_forward_hook(hook))


def unshift_(model: PreTrainedModel) -> None:
    for module in model.modules():
        for hook in vars(module).pop(_HOOK, ()):
            hook.remove()


def shift(size: int = 48, times: float = 2.0) -> Patch:
    by = torch.randn(size, generator=torch.Generator().manual_seed(0))
    return Patch("shift", {"module": "model.layers.0.mlp.up_proj", "times": times}, {"by": by})


@contextmanager
def shifts_known() -> Iterator[None]:
    """Within the context, the kind is known."""
    register(PatchKind("shift", frozenset({"module", "times"}), shift_, unshift_, tensors=frozenset({"by"})))
    try:
        yield
    finally:
        del KINDS["shift"]
