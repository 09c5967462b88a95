"""BESA: block after block, how much of each matrix or row becomes zero is learned from the error of the block's output
(Xu et al., arXiv 2402.16880).

Section 3.1, eq. 1: a block's error beside its dense outputs, plus a penalty on the distance of its share of zeros from
    the one asked for; weights are frozen. Blocks in order, each behind the pruned ones; `compresso.sweep.block`.
Section 3.2: entries of a row in the order of Wanda's score, a mixture over candidate rates, masks that let gradients
    through; `compresso.core.learned_sparsity`. A mixture for each matrix, or for each row (`per`).
Section 3.3, joint with quantization (`bits`): shares of the ends of each row's grid are learned with the masks;
    `compresso.core.learned_clipping`. A few small weights more round to zero.
Section 4.1 and the authors' code: Prodigy (`compresso.core.prodigy`), one epoch, one example a step, penalty weight 5,
    error by channel relative to the dense channel's size (the paper writes a plain norm).

Departures: a block ends at its number of zeros exactly: all its shares move by one amount, which is recorded, and none
out of `rates`; there, the penalty leaves about 1 % either way, and more than 5 % is an error here. Logits go into the
softmax as they are; the code's sigmoid before it (`smooth`) reaches no share outside of .376 to .624. Where half is not
what is asked for, logits start at the flattest mixture with that share; there, at half. The last block is not run
again. Rows are taken in their order in each epoch. Calibration rows are the run's, not C4 by itself. The adapters of
the code, which begin at zero twice and never learn, and its masks by column, are not here. The paper never drops the
last entry of a row; `rates: [0, 0.99]` does that, and the default is the code's.

Ours, and off unless asked for: `compensate`. Once a block's zeros are fixed, the weights that stay in a row make up for
them as in SparseGPT (`compresso.core.obs`); BESA itself updates no weight. Inputs that are always 0 lose their weights
beyond the number asked for.

Guesses, where neither says: ends of grids learn by Adam at `clip_lr` 0.01 and are held between .1 and 1; Adam's rate
for logits, 0.05, where Prodigy is not wanted; with `bits` the order is that of the unrounded weights. `d_coef` is 1:
the authors tuned it for each LLaMA (layer by layer .05 to 50, row by row 5 to 50) behind their sigmoid, and without it
50 takes logits at once to where a single rate has all the weight and nothing more is learned.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core.learned_sparsity import candidate_rates, channel_error, landed, logits_for, reachable
from compresso.core.obs import Factor, NotPositiveDefiniteError, inverse_factor
from compresso.core.prodigy import Prodigy
from compresso.core.sparsity import count_of, wanda_score
from compresso.errors import NumericError
from compresso.job import Job
from compresso.observe.folds import Stats, second_moment, squares
from compresso.stage import Effects, Passes, stage, sweep_passes
from compresso.sweep.block import BlockEdit, BlockVisit, Reference
from compresso.sweep.calibration import Calibration
from compresso.sweep.compressed import Compressed, rounded_weights, zeroed_weights
from compresso.sweep.learned_masks import LearnedLinear, Mixing
from compresso.sweep.swept import swept
from compresso.sweep.targets import Group, Groups, Where, chosen, matrix

FARTHEST = 0.05
"""How far the share that a block learned may be from the one asked for."""


@stage(
    "besa",
    title="learns block by block how much of each matrix or row becomes zero",
    paper="2402.16880",
    effects=Effects.WEIGHTS,
    needs=("data", "gradients"),
    when="Half of the weights where Wanda loses too much and hours are there: it trains each block on its own.",
    failures=(
        "Zeros stored dense save no bytes and no time without a kernel for them. Few examples are few steps: shares"
        " stay near where they began."
    ),
    alone="learns block by block from all calibration rows",
    zeroes={},
)
class Besa:
    """Knobs of BESA.

    Args:
        sparsity: share of each block's weights that become zero.
        per: what has a learned share: each "matrix", or each "row".
        step: distance of the candidate rates; at least a tenth of the paper's, since memory grows with their number.
        rates: the least and the greatest candidate; no row loses less, or more, but for a part of an entry where whole
            ones do not make up the block's number of zeros.
        smooth: logits go through a sigmoid before the softmax, as in the authors' code.
        importance: the order in which entries of a row leave: "wanda", or "magnitude".
        reference: what a block is to output: of the dense "block" on the inputs that it reads, or of the dense
            "model".
        bits: rounds what is left to a grid of 2^bits points a row, whose ends are learned; None rounds nothing. Stored
            as full numbers.
        penalty: weight of the squared relative distance of a block's share from the one asked for.
        optimizer: of the logits: "prodigy" or "adam".
        lr: of the logits; None is 1 for Prodigy, 0.05 for Adam.
        d_coef: factor on the rate that Prodigy finds.
        clip_lr: rate of the ends of grids.
        epochs: passes over the examples for each block; a batch of the calibration is a step.
        compensate: weights that stay make up for those that left, by optimal brain surgeon as in `sparsegpt`; ours.
        where: layers, modules and exceptions; see `compresso.sweep.targets.Where`.
        calibration: examples, batch, activations, true_sequential; see `compresso.sweep.calibration.Calibration`.
    """

    keeps_moments: ClassVar[bool] = True
    """With `compensate` its statistic is a second moment, [in, in]."""
    learned_bytes: ClassVar[int] = 40
    """Of memory for each weight of a block: ranks, masks, masked weights and gradients, in float32."""

    sparsity: Annotated[float, Gt(0), Lt(1)] = 0.5
    per: Literal["matrix", "row"] = "matrix"
    step: Annotated[float, Ge(1e-3), Le(0.5)] = 0.01
    rates: tuple[Annotated[float, Ge(0), Lt(1)], Annotated[float, Gt(0), Le(1)]] = (0.0, 1.0)
    smooth: bool = False
    importance: Literal["wanda", "magnitude"] = "wanda"
    reference: Reference = Reference.BLOCK
    bits: Annotated[int, Ge(2), Le(8)] | None = None
    penalty: Annotated[float, Gt(0)] = 5.0
    optimizer: Literal["prodigy", "adam"] = "prodigy"
    lr: Annotated[float, Gt(0)] | None = None
    d_coef: Annotated[float, Gt(0)] = 1.0
    clip_lr: Annotated[float, Ge(0)] = 0.01
    epochs: Annotated[int, Ge(1)] = 1
    compensate: bool = False
    where: Where = Where()
    calibration: Calibration = Calibration(batch=1)

    def __post_init__(self) -> None:
        """Refuse a share that no logits have, and knobs without a use."""
        low, high = reachable(candidate_rates(self.step, *self.rates), self.smooth)
        if not low < self.sparsity < high:
            cure = "set smooth to false" if self.smooth else "widen rates"
            raise ValueError(
                f"sparsity={self.sparsity} is out of reach of rates={list(self.rates)}, smooth={self.smooth}: wanted"
                f" more than {low:.3f} and less than {high:.3f}; {cure}"
            )
        if self.calibration.true_sequential:
            raise ValueError("a block is learned as a whole, not group by group; set true_sequential to false")

    def check(self, model: PreTrainedModel, arch: Arch) -> Groups:
        """The linears that are pruned; needs shapes only. Raises RecipeError or ArchError."""
        return chosen(model, arch, self.where)

    def compressed(self, model: PreTrainedModel, arch: Arch) -> Compressed:
        """The weights it works on, the share that becomes zero, and the bits of the others if it rounds them."""
        groups = self.check(model, arch)
        found = zeroed_weights(model, groups, self.sparsity, None)
        if self.bits is None:
            return found
        return replace(found, bits=rounded_weights(model, groups, self.bits, 0, symmetric=False).bits)

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """The passes of the sweep, one more where the dense model runs beside it, and those that learn."""
        share = len(self.check(model, arch)) / len(arch.blocks(model))
        steps = self.calibration.examples * self.epochs
        return [
            sweep_passes(self, model, arch, looks=int(self.reference is Reference.MODEL)),
            Passes("training", steps, forwards=share, backwards=share, weights=True),
        ]

    def __call__(self, job: Job) -> Job:
        """Sweep over the blocks."""
        groups = self.check(job.model, job.arch)
        fold = second_moment if self.compensate else squares
        edit = BlockEdit(lambda visit: self._learned(job.model, visit), self.reference)
        found, notes = swept(job.sweeping("besa", self), groups, self.calibration, fold, edit)
        blocks = {str(layer): notes.pop(str(layer)) for layer in groups}
        return job.note("besa", **found).note("besa", optimizer=self.optimizer, bits=self.bits, blocks=blocks, of=notes)

    def _learned(self, model: PreTrainedModel, visit: BlockVisit) -> Mapping[str, Any]:
        """Learn one block's zeros and make them; what came of it by linear, and of the block by its number."""
        linears = self._linears(model, visit)
        errors = self._train(visit, linears)
        total = sum(one.rows * one.columns for one in linears.values())
        learned = sum(float(one.row_shares().sum()) * one.columns for one in linears.values())
        if abs(apart := learned / total - self.sparsity) > FARTHEST:
            raise NumericError(
                f"block {visit.layer} learned a share of zeros {apart:+.3f} from sparsity={self.sparsity}, and at"
                f" most {FARTHEST} is made up for; raise penalty, epochs or calibration.examples"
            )
        # the penalty leaves about 1 %: one shift for all ends it
        end = landed(
            [one.row_shares() for one in linears.values()],
            [one.columns for one in linears.values()],
            count_of(self.sparsity, total),
            self.rates,
        )
        facts: dict[str, Any] = {}
        counts = dict(zip((one.name for one in linears.values()), end.counts, strict=True))
        by_name = {one.name: one for one in linears.values()}
        for group in visit.groups:
            factor = self._factor(group, visit.seen[group.names[0]]) if self.compensate else None
            for name in group.names:
                facts[name] = dict(by_name[name].bake_(counts[name], factor))
        quarter = max(1, len(errors) // 4)
        first, last = (sum(part) / quarter for part in (errors[:quarter], errors[-quarter:]))
        return {**facts, str(visit.layer): {"shift": end.shift, "steps": len(errors), "error": [first, last]}}

    def _factor(self, group: Group, seen: Stats) -> Factor:
        """What lets the weights that stay make up for the others. Raises NumericError where there is none."""
        try:
            return inverse_factor(seen.total * (2 / seen.n))
        except NotPositiveDefiniteError as error:
            raise NumericError(
                f"{', '.join(group.names)}: {error}; give more calibration examples, set compensate to false, or add it"
                " to where.ignore"
            ) from error

    def _linears(self, model: PreTrainedModel, visit: BlockVisit) -> dict[str, LearnedLinear]:
        """The block's linears, entries ranked, by the name of their weight within the block."""
        rates = candidate_rates(self.step, *self.rates)
        mixing = Mixing(rates, logits_for(self.sparsity, rates, self.smooth), self.per == "row", self.smooth)
        inside = {id(module): name for name, module in visit.block.named_modules()}
        found: dict[str, LearnedLinear] = {}
        for group in visit.groups:
            for name in group.names:
                weight, seen = matrix(model, name), visit.seen[group.names[0]].total
                squared = seen.diagonal() if self.compensate else seen
                scores = wanda_score(weight, squared) if self.importance == "wanda" else weight.float().abs()
                place = f"{inside[id(model.get_submodule(name))]}.weight"
                found[place] = LearnedLinear(model, name, scores, mixing, self.bits)
        return found

    def _train(self, visit: BlockVisit, linears: Mapping[str, LearnedLinear]) -> list[float]:
        """A step for each batch and epoch; the block's errors, in order."""
        steppers = self._optimizers(list(linears.values()))
        total = sum(one.rows * one.columns for one in linears.values())
        errors: list[float] = []
        for index in [*range(len(visit))] * self.epochs:
            now = {place: one.masked() for place, one in linears.items()}
            output = visit.run(visit.batch(index), {place: weight for place, (weight, _) in now.items()})
            error = channel_error(output, visit.dense_output(index))
            share = torch.stack([zeros for _, zeros in now.values()]).sum() / total
            loss = error + self.penalty * ((share - self.sparsity) / self.sparsity).square().to(error.dtype)
            if not bool(loss.isfinite()):
                raise NumericError(
                    f"block {visit.layer} under masks has the loss {float(loss.detach())}: the model overflows on this"
                    " data; use float32 or bfloat16, or lower lr"
                )
            for stepper in steppers:
                stepper.zero_grad()
            loss.backward()  # pyright: ignore[reportUnknownMemberType]
            for stepper in steppers:
                stepper.step()
            for one in linears.values():
                one.hold_clips_()
            errors.append(float(error.detach()))
        return errors

    def _optimizers(self, linears: Sequence[LearnedLinear]) -> list[Prodigy | torch.optim.Adam]:
        """What steps logits, and ends of grids where there are some."""
        logits: list[Tensor] = [one.logits for one in linears]
        clips: list[Tensor] = [clip for one in linears for clip in one.clips]
        if self.optimizer == "adam":
            first: Prodigy | torch.optim.Adam = torch.optim.Adam(logits, lr=self.lr or 0.05)
        else:
            first = Prodigy(logits, lr=self.lr or 1.0, coefficient=self.d_coef)
        return [first, *([torch.optim.Adam(clips, lr=self.clip_lr)] if clips else [])]
