"""Units that leave a little at every update, and tensors that follow now and then (HomoDistil, arXiv 2302.09632).

    before a step   sensitivities of the gradients just taken enter a moving average
    after it        the lowest scores beyond the schedule's count are gone: their weights and both moments become 0
    now and then    what is gone is cut out of tensors and moments; the masked model is compared with the smaller one

What is gone never comes back. When each unit left, and when tensors were cut, are a few bytes a unit, kept as buffers:
training checkpoints carry them, and a resumed run takes the shapes of its checkpoint before it reads the numbers.
Between two cuts the weights of all that touches a unit are 0, which is the masked model but for LayerNorms: hooks leave
dimensions that are gone out of their mean and variance.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.arch.head_channels import HEAD_CHANNELS, NarrowsHeads
from compresso.arch.queries import axes_of
from compresso.core.axis import Axis, Kind
from compresso.core.counted import counted
from compresso.core.plan import Plan
from compresso.core.sensitivity import sensitivities
from compresso.edit.gate import gated
from compresso.edit.in_place import States, cut_moments_, same_parameters, zero_units_
from compresso.edit.removal import remove_
from compresso.edit.shrink import set_features_
from compresso.solve.gradual import kept_count, still_kept
from compresso.solve.greedy import Flat
from compresso.training.order import Micro


@dataclass(frozen=True)
class Left:
    """What a student has left of its teacher.

    Args:
        plan: of the teacher's units, those that stay.
        ours: axis name of the student -> positions of the same units in its tensors as they are, int64; an axis that is
            not named has lost none since it was cut.
    """

    plan: Plan
    ours: Mapping[str, Tensor]


Losses = Callable[[Mapping[str, Tensor], Micro, Left], dict[str, Tensor]]
"""A batch, where it stands, what is left -> "loss" and numbers to log."""


class GradualPruning(nn.Module):
    """A training whose student loses units.

    Args:
        model: the student; all of its weights learn.
        arch: what describes it.
        losses: what it minimises.
        final: axis name -> units that stay at the end; other axes lose none. Their units tile their tensors.
        start, end: updates between which units leave.
        cuts: after how many updates tensors are cut, ascending.
        momentum: of the moving average of scores.
        before: what had left the teacher before.
        probe: what the masked and the smaller model are compared on: `ids` and `given` of `remove_`.
    """

    score: Tensor
    """Moving average of the sensitivity of each unit [units], float64; of units that are gone the last."""
    gone: Tensor
    """After how many updates each unit left [units], int64; 0 where it is there."""
    cut: Tensor
    """After how many updates tensors were cut last [1], int64."""
    eps: Tensor
    """Epsilons of the norms over hidden dimensions [norms], float64."""
    difference: Tensor
    """The largest difference of outputs between a masked and a smaller model so far [1], float64."""

    def __init__(
        self,
        model: PreTrainedModel,
        arch: Arch,
        losses: Losses,
        final: Mapping[str, int],
        *,
        start: int,
        end: int,
        cuts: Sequence[int],
        momentum: float = 0.85,
        before: Plan | None = None,
        probe: tuple[Sequence[int], Mapping[str, Tensor] | None] = ((), None),
    ) -> None:
        super().__init__()
        self.model = model
        self._arch, self._losses, self._final, self._probe = arch, losses, dict(final), probe
        self.axes = self._axes_now()
        self._start, self._end, self._cuts, self._momentum = start, end, tuple(cuts), momentum
        self._before = before or Plan()
        self._flat = Flat(self.axes)
        self._norms = [norm for axis in self.axes for norm in axis.norms]
        self._optimizer: torch.optim.Optimizer | None = None
        self._known: Left | None = None
        self._hooks = ExitStack()
        self.register_buffer("score", torch.zeros(self._flat.units, dtype=torch.float64))
        self.register_buffer("gone", torch.zeros(self._flat.units, dtype=torch.int64))
        self.register_buffer("cut", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("eps", self._epsilons())
        self.register_buffer("difference", torch.zeros(1, dtype=torch.float64))

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within the context LayerNorms may be hooked; afterwards they are not."""
        try:
            yield
        finally:
            self._hooks.close()

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Remember whose moments are edited with the weights."""
        self._optimizer = optimizer  # and not its state, which is another object once it was loaded

    def forward(self, batch: Mapping[str, Tensor], micro: Micro) -> dict[str, Tensor]:
        """batch: what the model reads, and labels. Returns what the losses do."""
        return self._losses(batch, micro, self.left())

    @torch.no_grad()
    def observe_(self, update: int) -> None:
        """Score units by the gradients of an update, before they are clipped; not if one of them is not finite."""
        self.score_({name: one.grad for name, one in self.model.named_parameters() if one.grad is not None})

    @torch.no_grad()
    def score_(self, gradients: Mapping[str, Tensor]) -> None:
        """Score units by gradients of the student's parameters; not if one of them is not finite."""
        found = sensitivities(self._axes_now(), dict(self.model.named_parameters()), gradients)
        if not all(bool(one.isfinite().all()) for one in found.values()):
            return
        scores, there = self._flat.split(self.score), self._flat.split(self._there())
        for name, new in found.items():
            score, here = scores[name], there[name]
            score[here] = self._momentum * score[here] + (1 - self._momentum) * new.to(score)

    def prune_(self, update: int) -> dict[str, float]:
        """Let units go that the schedule no longer keeps after this update, and cut tensors if it is time to."""
        return self.settle_(update + 1)

    @torch.no_grad()
    def settle_(self, done: int) -> dict[str, float]:
        """Bring the student to where it has to be after so many updates.

        Returns {"left": the share of units that stay, the mean over axes}.

        Raises NumericError as `remove_`.
        """
        gone, score = self._flat.split(self.gone.cpu() > 0), self._flat.split(self.score.cpu())
        counts = {
            axis.name: kept_count(axis.size, self._final[axis.name], done, self._start, self._end) for axis in self.axes
        }
        kept = still_kept(self.axes, score, gone, counts)
        leaving = self._flat.join(kept).to(self.gone.device) == 0
        self.gone[leaving & (self.gone == 0)] = done
        self._known = None
        self._zero_()
        if any(int(self.cut) < cut <= done for cut in self._cuts):
            self._cut_(done)
        shares = [float((gone == 0).double().mean()) for gone in self._flat.split(self.gone).values()]
        return {"left": sum(shares) / len(shares)}

    def left(self) -> Left:
        """What the student has left."""
        if self._known is None:
            alive, there = self._flat.split(self.gone == 0), self._flat.split(self._there())
            plan: dict[str, tuple[int, ...]] = {}
            ours: dict[str, Tensor] = {}
            for name, stays in alive.items():
                if not bool(stays.all()):
                    plan[name] = _where(stays)
                if not bool(stays[there[name]].all()):
                    ours[name] = stays[there[name]].nonzero().flatten()
            self._known = Left(self._before.then(Plan(plan)), ours)
            self._hook_(ours)
        return self._known

    def plan(self) -> Plan:
        """What stays of the units that it began with."""
        return Plan({name: _where(gone == 0) for name, gone in self._flat.split(self.gone).items()})

    @torch.no_grad()
    def take_shape_(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the student the shapes of a training state, before its numbers are put back."""
        self._hooks.close()
        for name, parameter in self.named_parameters():
            saved = tensors.get(f"param/{name}")
            if saved is not None and parameter.shape != saved.shape:
                parameter.grad = None
                parameter.data = parameter.data.new_empty(saved.shape)
        for module in self.model.modules():
            set_features_(module)
        gone, cut = (tensors[f"buffer/{name}"] for name in ("gone", "cut"))
        there = self._flat.split(((gone == 0) | (gone > cut)).cpu())
        for axis in self.axes:
            if axis.kind == Kind.HEAD_CHANNEL and axis.layer is not None and isinstance(self._arch, NarrowsHeads):
                self._arch.narrow_heads_(self._arch.blocks(self.model)[axis.layer], int(there[axis.name].sum()))
        for norm, eps in zip(self._norms, tensors["buffer/eps"].tolist(), strict=True):
            self.model.get_submodule(norm).variance_epsilon = eps  # pyright: ignore[reportAttributeAccessIssue]
        self._arch.sync_config_(self.model)
        self._known = None

    def _cut_(self, done: int) -> None:
        """Cut what is gone out of the tensors."""
        ours = self.left().ours
        self.cut.fill_(done)
        if ours:
            axes = self._every_axis()
            masks = {axis.name: torch.zeros(axis.size) for axis in axes if axis.name in ours}
            for name, stays in ours.items():
                masks[name][stays.cpu()] = 1
            self._hooks.close()
            cut_moments_(self._states, self.model, axes, Plan.from_masks(axes, masks))
            with same_parameters(self.model), _modes(self.model):
                difference = remove_(self.model, axes, masks, *self._probe, by=f"cut after {counted(done, 'update')}")
            self.difference.clamp_(min=difference)
            self.eps.copy_(self._epsilons())
        self._known = None

    def _hook_(self, ours: Mapping[str, Tensor]) -> None:
        """Let LayerNorms pass over what is gone; ours: what stays of axes that lost some since they were cut."""
        self._hooks.close()
        axes = [axis for axis in self._axes_now() if axis.layer_norms and axis.name in ours]
        masks = {axis.name: torch.zeros(axis.size, device=self.gone.device) for axis in axes}
        for name, mask in masks.items():
            mask[ours[name]] = 1
        if axes:
            self._hooks.enter_context(gated(self.model, axes, masks))

    def _zero_(self) -> None:
        """Set weights and moments of units that are gone, but not cut, to 0."""
        ours = self.left().ours
        parameters = dict(self.model.named_parameters())
        for axis in self._axes_now():
            if axis.name not in ours:
                continue
            out = torch.ones(axis.size, dtype=torch.bool, device=self.gone.device)
            out[ours[axis.name]] = False
            units = out.nonzero().flatten()
            for name in {piece.param: None for piece in axis.slices}:
                parameter = parameters[name]
                moments = (
                    [self._states[parameter][key] for key in ("exp_avg", "exp_avg_sq")]
                    if (parameter in self._states)
                    else []
                )
                for tensor in (parameter, *moments):
                    zero_units_(tensor, axis, name, units)

    def _axes_now(self) -> list[Axis]:
        """The axes that lose units, of the student as it is."""
        return [axis for axis in self._every_axis() if axis.name in self._final]

    def _every_axis(self) -> tuple[Axis, ...]:
        """All axes of the student as it is; those of heads' channels if they lose some."""
        inside = any(name.endswith(HEAD_CHANNELS) for name in self._final)
        return axes_of(self._arch, self.model, (Kind.HEAD_CHANNEL,) if inside else ())

    @property
    def _states(self) -> States:
        return {} if self._optimizer is None else cast(States, self._optimizer.state)

    def _there(self) -> Tensor:
        """Which units the tensors still hold [units], bool."""
        return (self.gone == 0) | (self.gone > self.cut)

    def _epsilons(self) -> Tensor:
        """Of the norms over hidden dimensions, as they are now."""
        now = [float(self.model.get_submodule(norm).variance_epsilon) for norm in self._norms]  # pyright: ignore
        return torch.tensor(now, dtype=torch.float64)


def _where(stays: Tensor) -> tuple[int, ...]:
    """Positions of what is true in [size], ascending."""
    return tuple(int(i) for i in stays.nonzero().flatten())


@contextmanager
def _modes(model: nn.Module) -> Iterator[None]:
    """Within the context modules may go over to evaluation; afterwards they are as they were."""
    before = {module: module.training for module in model.modules()}
    yield
    for module, mode in before.items():
        module.training = mode
