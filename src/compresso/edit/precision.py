"""The dtype of a model's numbers, without that of what follows from its config.

`nn.Module.to(dtype)` and `.float()` take every floating buffer along. The frequencies of rotary positions are one that
no file holds and that transformers keeps in float32: rounded to bfloat16 once, they stay rounded, and the model is
another one than its checkpoint opens as. So it is with the corrections of routers' scores, which transformers opens in
float32 in a model of bfloat16.
"""

from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def cast_(model: Model, dtype: torch.dtype) -> Model:
    """Put floating parameters, and floating buffers that checkpoints hold, into a dtype, in place; the others stay, and
    in half precision those that transformers opens in float32.

    Parameters stay the same objects and lose their gradients where they change. Returns the model.
    """
    wide = getattr(model, "_keep_in_fp32_modules_strict", None) if dtype.itemsize < 4 else None
    stay = set(wide or ())
    for path, module in model.named_modules():
        free = stay.isdisjoint(path.split("."))
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and parameter.dtype != dtype and free and name not in stay:
                parameter.grad = None
                parameter.data = parameter.data.to(dtype)
        for name, buffer in module.named_buffers(recurse=False):
            lasting = name not in module._non_persistent_buffers_set
            if buffer.is_floating_point() and lasting and free and name not in stay:
                module._buffers[name] = buffer.to(dtype)
    return model
