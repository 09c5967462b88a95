"""Activations on few levels: what some linears read is rounded, by a grid of each token's own or by one that was
learned.

Two forward patches, of which weights and files do not know. They compute with full numbers what integers would give:
their speed is that of full numbers. The grids are those of `compresso.core.quantisers`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso.core.axis import Axis, Kind
from compresso.core.quantisers import FULL, MOST, Quantiser, Style
from compresso.edit.magnitude_masks import ends
from compresso.edit.patch import Patch, PatchKind, register
from compresso.errors import ArchError

TOKENS, LEARNED = "quantise_inputs", "quantise_inputs_in_range"
"""The patch with a grid of each token's own, and the one with a learned grid of each linear."""
Asymmetric = Literal["none", "activation", "all"]
"""Which inputs have a grid from their least to their greatest: those behind an activation without a gate, or all."""
_HOOK = "_compresso_quantise_inputs"
_PARAMS = frozenset({"bits", "style", "symmetric", "asymmetric"})
_RANGES = "ranges"
_LEAST = 3


@dataclass(frozen=True)
class Inputs:
    """Which linears read rounded inputs, and how.

    Args:
        bits: of a code, 3 to 8, or 16 for none.
        style: of the grids.
        symmetric, asymmetric: full names of the linears with the one and with the other grid.
    """

    bits: int
    style: Style
    symmetric: tuple[str, ...]
    asymmetric: tuple[str, ...] = ()

    @property
    def linears(self) -> tuple[str, ...]:
        """All of them, in the order of their ranges."""
        return self.symmetric + self.asymmetric

    def quantiser(self, linear: str) -> Quantiser:
        """Of what one of them reads."""
        return Quantiser(self.bits, linear not in self.asymmetric, self.style)

    def patch(self, ranges: Tensor | None = None) -> Patch:
        """The patch that rounds them.

        Args:
            ranges: least and greatest input of each linear [n, 2], in the order of `linears`; None for each token's
                own.
        """
        params = {
            "bits": self.bits,
            "style": str(self.style),
            "symmetric": list(self.symmetric),
            "asymmetric": list(self.asymmetric),
        }
        return Patch(TOKENS, params) if ranges is None else Patch(LEARNED, params, {_RANGES: ranges})


def inputs_of(bits: int, style: Style, asymmetric: Asymmetric, linears: Sequence[str], axes: Sequence[Axis]) -> Inputs:
    """How linears of a model with these axes read their inputs: none rounded at 16 bits.

    Raises ValueError for bits of which no record is read.
    """
    if bits != FULL and not _LEAST <= bits <= MOST:
        raise ValueError(f"input_bits={bits}: wanted {_LEAST} to {MOST}, or {FULL} for no rounding")
    if bits == FULL:
        return Inputs(FULL, style, ())
    behind = behind_activations(axes) if asymmetric == "activation" else set[str]()
    one_sided = [name for name in linears if asymmetric == "all" or name in behind]
    return Inputs(bits, style, tuple(name for name in linears if name not in one_sided), tuple(one_sided))


def behind_activations(axes: Sequence[Axis]) -> set[str]:
    """The linears that read an FFN's channels behind an activation that no gate multiplies."""
    found = [ends(axis) for axis in axes if axis.kind == Kind.CHANNEL]
    return {piece.param.removesuffix(".weight") for written, read in found if len(written) == 1 for piece in read}


def quantise_inputs_(model: PreTrainedModel, inputs: Inputs, ranges: Tensor | None = None) -> None:
    """Round what linears read, in place; arguments as of `Inputs.patch`.

    Raises:
        ArchError: one is not there, or there are not as many ranges.
    """
    modules = dict(model.named_modules())
    for name in inputs.linears:
        if name not in modules:
            raise ArchError(f"the inputs of {name} cannot be rounded: the model has no such module")
    if ranges is not None and list(ranges.shape) != [len(inputs.linears), 2]:
        raise ArchError(f"ranges {list(ranges.shape)} of rounded inputs; wanted {[len(inputs.linears), 2]}")
    for i, name in enumerate(inputs.linears):
        module = modules[name]
        if (before := vars(module).pop(_HOOK, None)) is not None:
            before.remove()
        hook = _rounding(inputs.quantiser(name), None if ranges is None else ranges[i])
        vars(module)[_HOOK] = module.register_forward_pre_hook(hook)


def keep_inputs_(model: PreTrainedModel) -> None:
    """Undo `quantise_inputs_`."""
    for module in model.modules():
        if (hook := vars(module).pop(_HOOK, None)) is not None:
            hook.remove()


def _rounding(quantiser: Quantiser, ends: Tensor | None) -> Any:
    def hook(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        given: Tensor = arguments[0]
        wide = given.float()
        if ends is None:
            rounded = quantiser(wide)
        else:
            low, high = ends.to(given.device, wide.dtype)
            rounded = quantiser.within(wide, low, high)
        return (rounded.to(given.dtype), *arguments[1:])

    return hook


def _apply_(model: PreTrainedModel, patch: Patch) -> None:
    quantise_inputs_(model, _of(patch.params), patch.tensors.get(_RANGES))


def _of(params: Mapping[str, Any]) -> Inputs:
    """What a record says. Raises ArchError for what no version of this program wrote."""
    bits, style = params["bits"], params["style"]
    names = [params["symmetric"], params["asymmetric"]]
    known = isinstance(bits, int) and (_LEAST <= bits <= MOST or bits == FULL) and style in list(Style)
    if not known or not all(isinstance(one, list) and _words(one) for one in names):
        raise ArchError(
            f"rounded inputs of bits={bits!r}, style={style!r}: wanted {_LEAST} to {MOST} bits, one of"
            f" {', '.join(Style)}, and lists of linears; use the version that wrote it"
        )
    return Inputs(bits, Style(style), tuple(names[0]), tuple(names[1]))


def _words(names: Sequence[Any]) -> bool:
    return all(isinstance(name, str) for name in names)


for _name, _tensors in ((TOKENS, frozenset[str]()), (LEARNED, frozenset({_RANGES}))):
    register(PatchKind(_name, params=_PARAMS, apply_=_apply_, undo_=keep_inputs_, tensors=_tensors))


class InputRounding(nn.Module):
    """Rounding of one linear's inputs while it trains, whose range is learned on the way: a hook, and two numbers that
    checkpoints hold.

    The range is a moving average of least and greatest input; the first batch gives the first. In evaluation it stays.

    Args:
        quantiser: of the inputs.
        momentum: share of the range that stays, a batch; None for a range of each token's own.
    """

    low: Tensor
    high: Tensor
    batches: Tensor

    def __init__(self, quantiser: Quantiser, momentum: float | None = None) -> None:
        super().__init__()
        self.quantiser, self.momentum = quantiser, momentum
        self.counted: Tensor | None = None
        """Tokens that are no padding [batch, seq], of the batch that comes; None for all."""
        if momentum is not None:
            for name in ("low", "high", "batches"):
                self.register_buffer(name, torch.zeros(()))

    def forward(self, given: Tensor) -> Tensor:
        """Inputs [..., in] rounded, of the same type."""
        wide = given.float()
        if self.momentum is None:
            return self.quantiser(wide).to(given.dtype)
        if self.training:
            self._look(wide.detach())
        return self.quantiser.within(wide, self.low, self.high).to(given.dtype)

    @torch.no_grad()
    def _look(self, wide: Tensor) -> None:
        """Move the range towards a batch's."""
        assert self.momentum is not None
        if self.counted is not None and self.counted.shape == wide.shape[:-1]:
            wide = wide[self.counted.to(wide.device)]
        kept = self.momentum if bool(self.batches) else 0.0
        self.low.mul_(kept).add_(wide.min() * (1 - kept))
        self.high.mul_(kept).add_(wide.max() * (1 - kept))
        self.batches.add_(1)
