"""What a model computes beside what its weights say, as a value: a name, parameters, tensors, and how it goes on.

A kind of patch registers its name once, where it is written; records and files hold patches of that name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from compresso.errors import ArchError


@dataclass(frozen=True)
class Patch:
    """One change of the forward pass.

    Args:
        name: of its kind.
        params: JSON values.
        tensors: what it computes with, by name; of any device, none for most.
    """

    name: str
    params: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tensors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor], compare=False)

    def apply_(self, model: PreTrainedModel) -> None:
        """Compute with it from now on. Raises ArchError if it is unknown or does not fit the model."""
        kind_of(self).apply_(model, self)

    def undo_(self, model: PreTrainedModel) -> None:
        """Compute as before, also without other patches of its kind. Raises ArchError if it is unknown."""
        kind_of(self).undo_(model)


@dataclass(frozen=True)
class PatchKind:
    """How patches of one name work.

    Args:
        name: in records.
        params, tensors: names of what a patch of this kind has.
        apply_: puts a patch on a model. Raises ArchError if it does not fit.
        undo_: takes all patches of this kind off a model; does nothing where there are none.
        line: a patch as one line behind its name, for kinds whose records are lines; None for all others.
        read: the patch of the words of such a line, None if they are not one.
    """

    name: str
    params: frozenset[str]
    apply_: Callable[[PreTrainedModel, Patch], None]
    undo_: Callable[[PreTrainedModel], None]
    tensors: frozenset[str] = frozenset()
    line: Callable[[Patch], str] | None = None
    read: Callable[[Sequence[str]], Patch | None] | None = None


KINDS: dict[str, PatchKind] = {}
"""Every kind that is known, by name."""


def register(kind: PatchKind) -> PatchKind:
    """Make a kind known. Raises ValueError if another has its name."""
    if KINDS.setdefault(kind.name, kind) is not kind:
        raise ValueError(f"two kinds of patch are called '{kind.name}'; rename one")
    return kind


def kind_of(patch: Patch) -> PatchKind:
    """The kind of a patch. Raises ArchError if it is unknown, or the patch has not what its kind wants."""
    kind = KINDS.get(patch.name)
    if kind is None:
        raise unknown(patch.name)
    for what, has, wanted in (("params", patch.params, kind.params), ("tensors", patch.tensors, kind.tensors)):
        if set(has) != wanted:
            raise ArchError(
                f"forward patch '{patch.name}' has the {what} {sorted(has)}, and this compresso wants {sorted(wanted)};"
                " use the version that wrote it"
            )
    return kind


def unknown(patch: str) -> ArchError:
    """The error for a patch, or a line of records, that no kind knows."""
    return ArchError(f"forward patch '{patch[:80]}' is unknown to this compresso; use the version that wrote it")
