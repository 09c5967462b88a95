"""Parameter groups: one AdamW, in which each group has its own rate, schedule, direction and gradient clip.

One optimizer with three groups is the same as three optimizers, because AdamW's state is per parameter. Its state for a
parameter starts with the parameter's first gradient, so gates that join after a LoRA-only phase start with a fresh bias
correction. Gradient ascent (for Lagrange multipliers) is AdamW's `maximize`, never a negative rate, which would also
turn the weight decay round.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from compresso.errors import CompressoError


def constant(update: int) -> float:
    """The schedule that leaves a rate as it is."""
    return 1.0


@dataclass(frozen=True)
class Group:
    """Parameters that share an AdamW rule (Loshchilov and Hutter, arXiv 1711.05101).

    Args:
        name: for messages and records.
        params: the parameters; a parameter belongs to one group.
        lr: peak learning rate, not negative.
        schedule: factor on the rate at an update (index from 0).
        ascend: climb the gradient instead of descending it.
        clip: largest norm of this group's gradient, or None.
        betas, eps, weight_decay: AdamW's.
    """

    name: str
    params: Sequence[nn.Parameter]
    lr: float
    schedule: Callable[[int], float] = constant
    ascend: bool = False
    clip: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    @property
    def numbers(self) -> int:
        """How many numbers learn."""
        return sum(parameter.numel() for parameter in self.params)

    def facts(self) -> dict[str, object]:
        """What identifies the rule, for the comparison on resume; the schedule is code and cannot be compared."""
        return {
            "lr": self.lr,
            "ascend": self.ascend,
            "clip": self.clip,
            "betas": list(self.betas),
            "eps": self.eps,
            "weight_decay": self.weight_decay,
            "tensors": len(self.params),
            "numbers": self.numbers,
        }


def check_groups(groups: Sequence[Group], trainable: Mapping[str, nn.Parameter]) -> None:
    """Every trainable parameter belongs to exactly one group, and nothing else does.

    Raises:
        CompressoError: naming the parameter or group.
    """
    names = {id(p): name for name, p in trainable.items()}
    owner: dict[int, str] = {}
    for group in groups:
        if group.lr < 0:
            raise CompressoError(
                f"group '{group.name}' has lr={group.lr}, wanted >= 0; for gradient ascent set ascend=True"
            )
        for p in group.params:
            if id(p) not in names:
                raise CompressoError(
                    f"group '{group.name}' holds a parameter of shape {tuple(p.shape)} that is not a trainable"
                    " parameter of the objective; register it there, so that its gradient is averaged over processes"
                )
            if id(p) in owner:
                raise CompressoError(
                    f"parameter {names[id(p)]} is in the groups '{owner[id(p)]}' and '{group.name}'; wanted one of them"
                )
            owner[id(p)] = group.name
    forgotten = [name for key, name in names.items() if key not in owner]
    if forgotten:
        raise CompressoError(
            f"{len(forgotten)} trainable parameters are in no group, the first is {forgotten[0]}; add them or freeze"
            " them"
        )


def adamw(groups: Sequence[Group]) -> torch.optim.AdamW:
    """One AdamW with a parameter group for each group, in order."""
    rules = [
        {
            "params": list(g.params),
            "lr": g.lr,
            "betas": g.betas,
            "eps": g.eps,
            "weight_decay": g.weight_decay,
            "maximize": g.ascend,
        }
        for g in groups
    ]
    return torch.optim.AdamW(rules)


def gradient_norms(optimizer: torch.optim.Optimizer) -> list[Tensor | None]:
    """L2 norm of each group's gradient, scalars; None for a group without gradients. Collective when parameters are
    sharded.
    """
    norms: list[Tensor | None] = []
    for rule in optimizer.param_groups:
        grads = [p.grad for p in rule["params"] if p.grad is not None]
        norm = get_total_norm(grads) if grads else None
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return norms


def all_finite(norms: Sequence[Tensor | None]) -> Tensor:
    """Whether no gradient holds NaN or Inf, a scalar bool; true where there is no gradient."""
    present = [norm for norm in norms if norm is not None]
    return torch.stack(present).isfinite().all() if present else torch.tensor(True)


def clip_(optimizer: torch.optim.Optimizer, groups: Sequence[Group], norms: Sequence[Tensor | None]) -> None:
    """Scale the gradients of each group that has a clip, by its own norm."""
    for group, rule, norm in zip(groups, optimizer.param_groups, norms, strict=True):
        if group.clip is not None and norm is not None:
            clip_grads_with_norm_(rule["params"], group.clip, norm)


def set_rates_(optimizer: torch.optim.Optimizer, groups: Sequence[Group], update: int) -> None:
    """Set each group's rate for an update."""
    for group, rule in zip(groups, optimizer.param_groups, strict=True):
        rule["lr"] = group.lr * group.schedule(update)
