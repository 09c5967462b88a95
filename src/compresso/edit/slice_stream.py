"""A residual stream that is cut to a subspace before each half of a layer and before the head, in its own basis
(SliceGPT, arXiv 2401.15024).

A forward patch: weights, shapes and files are those of the dense model. Where a narrower model would hold P^T x, this
one holds P P^T x, with P [hidden, width] an orthonormal basis of the place; norms see the same root mean square, and
what is lost is lost for the sum behind, too. So it computes what the narrower model computes, and costs more, not less;
`compresso export --format sliced` writes that one. Gradients pass, and so do caches.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from compresso.arch.base import arch_for
from compresso.arch.sliceable import Sliceable, sliceable, stream_width
from compresso.edit.patch import Patch, PatchKind, register
from compresso.errors import ArchError

PATCH = "slice_stream"
_HOOKS = "_compresso_slice_stream"


def slice_stream_patch(bases: Tensor, head: Tensor) -> Patch:
    """The patch that cuts a stream.

    Args:
        bases: before the attention and the FFN of each layer, in this order [2 layers, hidden, width], columns
            orthonormal.
        head: before the last norm [hidden, head width], likewise.
    """
    return Patch(PATCH, {}, {"bases": bases, "head": head})


def cut_layer(block: nn.Module, family: Sliceable, bases: Sequence[Tensor | None]) -> list[RemovableHandle]:
    """Cut the stream before both halves of one layer; returns the hooks.

    Args:
        block: the layer.
        family: of its model.
        bases: before its attention, and before its FFN [hidden, width]; None leaves the stream there as it is.
    """
    before, inside = bases
    handles: list[RemovableHandle] = []
    if before is not None:
        handles.append(block.register_forward_pre_hook(_entering(before), with_kwargs=True))
    if inside is not None:
        lost: list[Tensor] = []

        def reads(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            kept = projected(given[0], inside)
            lost[:] = [given[0] - kept]
            return (kept, *given[1:])

        def leaves(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            kept = first - lost.pop().view_as(first)  # what the sum behind the FFN is to be without
            return (kept, *output[1:]) if isinstance(output, tuple) else kept

        handles.append(block.get_submodule(family.mlp.norm).register_forward_pre_hook(reads))
        handles.append(block.register_forward_hook(leaves))
    return handles


def projected(states: Tensor, basis: Tensor) -> Tensor:
    """States [..., hidden] without what lies outside a basis [hidden, width]; computed in the basis' dtype."""
    there = basis.to(states.device)
    return (states.to(there.dtype) @ there @ there.T).to(states.dtype)


def slice_stream_(model: PreTrainedModel, bases: Tensor, head: Tensor) -> None:
    """Cut the stream of a model, in place.

    Raises ArchError: its stream cannot be cut, or the bases are of another model.
    """
    whole_stream_(model)
    arch = arch_for(model.config)
    family, blocks = sliceable(model, arch), arch.blocks(model)
    hidden = stream_width(model, family)
    if bases.shape[:2] != (2 * len(blocks), hidden) or head.shape[0] != hidden:
        raise ArchError(
            f"bases {list(bases.shape)} and {list(head.shape)} cut the stream of another model than this one of"
            f" {len(blocks)} layers and {hidden} dimensions; use the folder that they were written into"
        )
    there, last = bases.to(model.device), head.to(model.device)
    for i, block in enumerate(blocks):
        vars(block)[_HOOKS] = cut_layer(block, family, (there[2 * i], there[2 * i + 1]))
    norm = model.get_submodule(family.final_norm)
    vars(norm)[_HOOKS] = [norm.register_forward_pre_hook(lambda _, given: (projected(given[0], last), *given[1:]))]


def whole_stream_(model: PreTrainedModel) -> None:
    """Undo `slice_stream_`."""
    for module in model.modules():
        for hook in vars(module).pop(_HOOKS, ()):
            hook.remove()


def sliced_by(patches: Sequence[Patch]) -> Patch | None:
    """The patch among these that cuts the stream; None if there is none."""
    return next((patch for patch in patches if patch.name == PATCH), None)


def _entering(basis: Tensor) -> Callable[..., Any]:
    def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if given:
            return (projected(given[0], basis), *given[1:]), named
        return given, {**named, "hidden_states": projected(named["hidden_states"], basis)}

    return hook


register(
    PatchKind(
        PATCH,
        params=frozenset(),
        tensors=frozenset({"bases", "head"}),
        apply_=lambda model, patch: slice_stream_(model, patch.tensors["bases"], patch.tensors["head"]),
        undo_=whole_stream_,
    )
)
