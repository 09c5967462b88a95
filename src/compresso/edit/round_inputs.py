"""Activations of 8 bits: what some linears read is rounded to 255 steps, anew at every call (SmoothQuant, arXiv
2211.10438, section 3).

A forward patch: weights and files do not know of it. It computes what an engine with integer activations would, with
floating point.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast, get_args

from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso.edit.patch import Patch, PatchKind, register
from compresso.errors import ArchError

PATCH = "round_inputs"
Range = Literal["token", "tensor"]
"""What shares a scale: a token's inputs, or all that come in one call."""
RANGES = get_args(Range)
_HOOK = "_compresso_round_inputs"
_TOP = 127


def round_inputs_patch(share: Range, linears: Sequence[str]) -> Patch:
    """The patch that rounds what these linears read.

    >>> round_inputs_patch("token", ["layers.0.mlp.up_proj"]).params
    {'share': 'token', 'linears': ['layers.0.mlp.up_proj']}
    """
    return Patch(PATCH, {"share": share, "linears": list(linears)})


def range_of(word: str) -> Range:
    """A word of `RANGES` as such."""
    assert word in RANGES
    return cast(Range, word)


def rounded(inputs: Tensor, share: Range) -> Tensor:
    """The nearest of the points scale * (-127 ... 127), where the largest |x| of a token, or of all, is 127 * scale.

    Gradients pass through.

    Args:
        inputs: [..., in].
        share: see `Range`.
    """
    wide = inputs.float()
    top = wide.abs().amax(dim=-1, keepdim=True) if share == "token" else wide.abs().amax()
    scale = (top / _TOP).clamp(min=1e-12)
    nearest = ((wide / scale).round() * scale).to(inputs.dtype)
    return inputs + (nearest - inputs).detach() if inputs.requires_grad else nearest


def round_inputs_(model: PreTrainedModel, share: Range, linears: Sequence[str]) -> None:
    """Round what these linears read, in place.

    Raises:
        ArchError: one is not there.
    """
    modules = dict(model.named_modules())
    for name in linears:
        if name not in modules:
            raise ArchError(f"the inputs of {name} cannot be rounded: the model has no such module")
        if (before := vars(modules[name]).pop(_HOOK, None)) is not None:
            before.remove()
        vars(modules[name])[_HOOK] = modules[name].register_forward_pre_hook(_rounding(share))


def keep_inputs_(model: PreTrainedModel) -> None:
    """Undo `round_inputs_`."""
    for module in model.modules():
        if (hook := vars(module).pop(_HOOK, None)) is not None:
            hook.remove()


def _rounding(share: Range) -> Callable[..., Any]:
    def hook(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounded(arguments[0], share), *arguments[1:])

    return hook


def _read(words: Sequence[str]) -> Patch | None:
    return round_inputs_patch(range_of(words[0]), words[1:]) if words and words[0] in RANGES else None


register(
    PatchKind(
        PATCH,
        params=frozenset({"share", "linears"}),
        apply_=lambda model, patch: round_inputs_(model, patch.params["share"], patch.params["linears"]),
        undo_=keep_inputs_,
        line=lambda patch: " ".join([PATCH, patch.params["share"], *patch.params["linears"]]),
        read=_read,
    )
)
