"""The dtype of a model's numbers, without that of what follows from its config.

`nn.Module.to(dtype)` and `.float()` take every floating buffer along. The frequencies of rotary positions are one that
no file holds and that transformers keeps in float32: rounded to bfloat16 once, they stay rounded, and the model is
another one than its checkpoint opens as.
"""

from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def cast_(model: Model, dtype: torch.dtype) -> Model:
    """Put floating parameters, and floating buffers that checkpoints hold, into a dtype, in place; the others stay.

    Parameters stay the same objects and lose their gradients where they change. Returns the model.
    """
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point() and parameter.dtype != dtype:
                parameter.grad = None
                parameter.data = parameter.data.to(dtype)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                module._buffers[name] = buffer.to(dtype)
    return model
