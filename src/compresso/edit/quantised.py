"""A model whose linears compute with rounded weights and rounded inputs while their full weights learn: Q(M * W).

Weights are torch parametrisations: whatever asks a linear for its weight gets the rounded one, with the gradient of the
full one. What pruning took stays 0: the mask M is multiplied in before the scale is taken, so that scales are those of
what is left and zeros are exactly 0 on any grid around 0. `fold_` leaves plain linears with the rounded weights.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compresso.core.quantisers import Quantiser
from compresso.edit.quantise_inputs import InputRounding, Inputs

_INPUTS = "compresso_inputs"


class Rounded(nn.Module):
    """The parametrisation: a tensor masked, then rounded.

    Args:
        quantiser: of the rows of [out, in]; None rounds nothing (a bias).
        kept: the mask M of the tensor's shape, bool; None where everything stays.
        whole: one scale for the whole tensor instead of one a row.
        transposed: whether the tensor is [in, out].
        prunable: whether pruning may take of it; that it has is noted where checkpoints hold it.
    """

    kept: Tensor | None
    pruned: Tensor | None

    def __init__(
        self,
        quantiser: Quantiser | None,
        kept: Tensor | None,
        whole: bool = False,
        transposed: bool = False,
        prunable: bool = False,
    ) -> None:
        super().__init__()
        self.quantiser, self.whole, self.transposed = quantiser, whole, transposed
        self.register_buffer("kept", kept)
        self.register_buffer("pruned", torch.zeros((), dtype=torch.bool) if prunable else None)

    def forward(self, full: Tensor) -> Tensor:
        """The full tensor as its linear computes with it."""
        masked = full if self.kept is None else full * self.kept
        if self.quantiser is None:
            return masked
        rows = masked.T if self.transposed else masked
        rounded = self.quantiser(rows.reshape(1, -1)).reshape(rows.shape) if self.whole else self.quantiser(rows)
        return rounded.T if self.transposed else rounded


class QuantisedModel:
    """A live model with roundings on it, which `fold_` takes off.

    Args:
        model: changed in place; its weights may learn already.
        linears: full names of those whose weights are rounded.
        weights: of their rows.
        inputs: which of them read rounded inputs, and how.
        momentum: of learned input ranges; None for each token's own.
        embeddings: full names of embeddings whose rows are rounded, too.
        whole: one scale a matrix instead of one a row.
        masked: names of the parameters that pruning may still take of; others have a mask if they are rounded and hold
            a zero, which stays one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        linears: Sequence[str],
        weights: Quantiser,
        inputs: Inputs,
        momentum: float | None = None,
        embeddings: Sequence[str] = (),
        whole: bool = False,
        masked: Sequence[str] = (),
    ) -> None:
        self._model, self._inputs, self._momentum = model, inputs, momentum
        self._full: dict[str, Tensor] = {}
        self._roundings: dict[str, Rounded] = {}
        self._read: dict[str, InputRounding] = {}
        self._handles: dict[str, RemovableHandle] = {}
        self._order: dict[str, list[str]] = {}
        rows = dict.fromkeys([*linears, *embeddings])
        for name in rows:
            self._put_(f"{name}.weight", weights, whole, masked)
        for name in masked:
            if name not in self._full:
                self._put_(name, None, False, masked)
        for name in inputs.linears:
            self._round_inputs_(name)

    @property
    def full(self) -> Mapping[str, Tensor]:
        """The full tensors that learn, by the names of their parameters before."""
        return self._full

    @property
    def reading(self) -> Sequence[InputRounding]:
        """The roundings of inputs, in the order of the linears that read them."""
        return [self._read[name] for name in self._inputs.linears]

    @torch.no_grad()
    def keep_(self, masks: Mapping[str, Tensor]) -> None:
        """Leave out from now on what a mask, by parameter name, says False of; what was left out stays so."""
        for name, mask in masks.items():
            kept, pruned = self._roundings[name].kept, self._roundings[name].pruned
            assert kept is not None and pruned is not None, f"{name} was not named as masked"
            kept.logical_and_(mask.to(kept.device))
            pruned.fill_(True)

    @property
    def pruned(self) -> bool:
        """Whether `keep_` was called, in this run or in the one that it continues."""
        return any(one.pruned is not None and bool(one.pruned) for one in self._roundings.values())

    def kept(self) -> dict[str, Tensor]:
        """The masks, by parameter name."""
        return {name: one.kept for name, one in self._roundings.items() if one.kept is not None}

    def ranges(self) -> Tensor | None:
        """Least and greatest input of each linear [n, 2], on the CPU; None where each token has its own."""
        if self._momentum is None or not self._read:
            return None
        return torch.stack([torch.stack([one.low, one.high]) for one in self.reading]).cpu()

    def fold_(self) -> None:
        """Leave what was computed with as plain parameters, and inputs as they come."""
        for name in self._roundings:
            module, _, tensor = name.rpartition(".")
            parametrize.remove_parametrizations(self._model.get_submodule(module), tensor, leave_parametrized=True)
        for module, order in self._order.items():  # a later stage sums gradients in it, reopened or not
            parameters = self._model.get_submodule(module)._parameters
            parameters |= {name: parameters.pop(name) for name in order}
        for name, handle in self._handles.items():
            handle.remove()
            delattr(self._model.get_submodule(name), _INPUTS)

    def _put_(self, name: str, quantiser: Quantiser | None, whole: bool, masked: Sequence[str]) -> None:
        module, _, tensor = name.rpartition(".")
        owner = self._model.get_submodule(module)
        full = owner.get_parameter(tensor)
        self._order.setdefault(module, [name for name, _ in owner.named_parameters(recurse=False)])
        there = full.detach() != 0 if quantiser is not None else torch.ones_like(full, dtype=torch.bool)
        needs = name in masked or not bool(there.all())
        rounding = Rounded(quantiser, there if needs else None, whole, isinstance(owner, Conv1D), name in masked)
        rounding.to(full.device)
        parametrize.register_parametrization(owner, tensor, rounding, unsafe=True)
        self._full[name] = owner.get_parameter(f"parametrizations.{tensor}.original")
        self._roundings[name] = rounding

    def _round_inputs_(self, name: str) -> None:
        module = self._model.get_submodule(name)
        reading = InputRounding(self._inputs.quantiser(name), self._momentum).to(next(module.parameters()).device)
        module.add_module(_INPUTS, reading)
        self._read[name] = reading
        self._handles[name] = module.register_forward_pre_hook(lambda _, given: (reading(given[0]), *given[1:]))
