"""E-Sparse: n:m pruning by weight, input norm and input entropy, over channels in a better order (Li et al., arXiv
2310.15929).

Section 3.2: the score of a weight is |W_ij| * (IR_j + alpha * ||x_j||_2), IR_j the entropy of the histogram of input j.
Section 3.3: channels are dealt to groups by their mean score, then swapped between groups in blocks of 256 places.
Section 3.4: linears that read the same input share one order. The order of FFN channels is folded into the rows of the
linears that write
    them, which costs nothing.

No public code was found; these are choices of ours: 100 bins between the extremes of the first batch of tokens, natural
logarithms, alpha = 1; the norm is the root mean square over tokens, so that both terms are of order one (`norm: sum`
for the root of the sum, as Wanda's); of the orders unchanged, swapped, and dealt and swapped, each group gets the one
that keeps most, since dealing alone can lose.

Where an order cannot be folded (q, k, v, o, gate, up, and FFNs with biases), the paper stores weights in it and gathers
the inputs before each product. Files here keep such weights where they were, so that any engine computes the right
thing, and the records give the order (`orders`); `compresso.load(..., gather=True)` reorders them and gathers, so that
they lie in n:m groups, for kernels that want them so. `shuffle: folded` keeps such groups in their own order: every
weight is n:m as it lies. Zeros stored dense save no bytes and no time.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core.axis import Axis, Kind
from compresso.core.entropy import BINS, entropy, histograms
from compresso.core.shuffle import best_order
from compresso.core.sparsity import lowest_in_groups, parse_pattern
from compresso.edit.reorder import reorder_
from compresso.job import Job
from compresso.observe.folds import Stats
from compresso.stage import Effects, Passes, stage, sweep_passes
from compresso.sweep.calibration import Calibration
from compresso.sweep.compressed import Compressed, zeroed_weights
from compresso.sweep.swept import swept
from compresso.sweep.targets import Group, Groups, Where, chosen, matrix, names_of


@stage(
    "e_sparse",
    title="keeps n of m weights by size, input norm and entropy, over channels in a better order",
    paper="2310.15929",
    effects=Effects.WEIGHTS,
    needs=("data",),
    when="n:m sparsity without updates; the order of channels keeps more than wanda's at the same pattern.",
    failures=(
        "Zeros stored dense save no bytes and no time. An order that is not folded holds where inputs are gathered"
        " (gather=True)."
    ),
    alone="bins what a channel reads by the first tokens that it sees",
    zeroes={},
)
class ESparse:
    """Knobs of E-Sparse.

    Args:
        pattern: "n:m", n KEPT of every m inputs.
        alpha: weight of the norm beside the entropy.
        norm: of an input: its root mean "mean" or the root of the "sum" of its squares.
        shuffle: "all" groups get an order of their own, only those whose order is "folded" for free, or "none".
        block: places among which channels are swapped, a multiple of m.
        where: layers, modules and exceptions; see `compresso.sweep.targets.Where`.
        calibration: examples, batch, activations, true_sequential; see `compresso.sweep.calibration.Calibration`.
    """

    keeps_moments: ClassVar[bool] = False

    pattern: str = "2:4"
    alpha: Annotated[float, Ge(0)] = 1.0
    norm: Literal["mean", "sum"] = "mean"
    shuffle: Literal["all", "folded", "none"] = "all"
    block: Annotated[int, Ge(2)] = 256
    where: Where = Where()
    calibration: Calibration = Calibration()

    def __post_init__(self) -> None:
        """Refuse a block that cuts groups."""
        if self.block % parse_pattern(self.pattern)[1]:
            raise ValueError(
                f"block={self.block} is no multiple of the {parse_pattern(self.pattern)[1]} of pattern {self.pattern}"
            )

    def check(self, model: PreTrainedModel, arch: Arch) -> Groups:
        """The linears that are pruned; needs shapes only. Raises RecipeError or ArchError."""
        return chosen(model, arch, self.where, parse_pattern(self.pattern)[1])

    def compressed(self, model: PreTrainedModel, arch: Arch) -> Compressed:
        """The weights it works on, and the share that becomes zero."""
        return zeroed_weights(model, self.check(model, arch), None, self.pattern)

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """The passes of the sweep."""
        return [sweep_passes(self, model, arch)]

    def __call__(self, job: Job) -> Job:
        """Sweep over the blocks."""
        groups = self.check(job.model, job.arch)
        foldable = _foldable(job, groups)

        def edit(group: Group, seen: Stats) -> Mapping[str, Any]:
            return self._prune(job.model, group, seen, foldable.get(group.names))

        found, notes = swept(job.sweeping("e_sparse", self), groups, self.calibration, histograms, edit)
        first = {name: facts for name, facts in notes.items() if "retained" in facts}
        return job.note("e_sparse", **found).note(
            "e_sparse",
            entropy={name: facts["entropy"] for name, facts in first.items()},
            norm={name: facts["norm"] for name, facts in first.items()},
            retained={name: facts["retained"] for name, facts in first.items()},
            folded=[name for name, facts in first.items() if facts["folded"]],
            orders=[facts["order"] for facts in first.values() if facts["order"] is not None],
        )

    def _prune(self, model: PreTrainedModel, group: Group, seen: Stats, axis: Axis | None) -> dict[str, Any]:
        """Zero the weights of a group, and reorder its channels where that is free; facts by linear, those of the group
        at the first.
        """
        n, m = parse_pattern(self.pattern)
        told = entropy(seen.total[:BINS]).float()
        size = (seen.total[BINS + 2] / (seen.n if self.norm == "mean" else 1)).sqrt().float()
        scores = [matrix(model, name).float().abs() * (told + self.alpha * size) for name in group.names]
        order, retained = torch.arange(len(told), device=told.device), {"unchanged": 1.0}
        if self.shuffle == "all" or (self.shuffle == "folded" and axis is not None):
            order, retained = best_order(torch.cat(scores), n, m, block=self.block)
        back, moved = order.argsort(), bool((order != torch.arange(len(order), device=order.device)).any())
        for name, score in zip(group.names, scores, strict=True):
            matrix(model, name).masked_fill_(lowest_in_groups(score[:, order], n, m)[:, back], 0)
        if axis is not None and moved:
            reorder_(model, axis, order)
        facts: dict[str, Any] = {
            "entropy": float(told.mean()),
            "norm": float(size.mean()),
            "retained": {name: round(share, 6) for name, share in retained.items()},
            "folded": axis is not None and moved,
            "order": {"linears": list(group.names), "order": order.tolist()} if moved and axis is None else None,
        }
        return {name: facts if name == group.names[0] else {} for name in group.names}


def _foldable(job: Job, groups: Groups) -> dict[tuple[str, ...], Axis]:
    """The groups that read FFN channels of which all other tensors are weights that are pruned as well: names -> the
    axis.
    """
    mine = {f"{name}.weight" for name in names_of(groups)}
    readers = {
        tuple(gate.module for gate in axis.gates if gate.side == "input") or _readers(axis): axis
        for axis in job.arch.axes(job.model)
        if axis.kind == Kind.CHANNEL and {piece.param for piece in axis.slices} <= mine
    }
    return {group.names: readers[group.names] for here in groups.values() for group in here if group.names in readers}


def _readers(axis: Axis) -> tuple[str, ...]:
    """The linears that read an axis' units: those whose weight has them along its inputs."""
    return tuple(piece.param.removesuffix(".weight") for piece in axis.slices if piece.dim == 1)
