"""Least-squares repair behind any selector: what lost inputs, or stands before a gap, is fitted to the dense model.

For each consumer of what left (the o and down projections) the second moment of its inputs and their product with a
target are gathered on the already edited model, block after block, and the weight is solved for; the objective is in
`compresso.core.repair`, the two targets in `compresso.sweep.repair`. Behind them stand OSSCAR (arXiv 2403.12983) and
ZipLM (arXiv 2302.04089), whose least squares aim at the layer's own dense output, and ReplaceMe (arXiv 2505.02819),
which puts a fitted matrix in the place of dropped layers. Here no matrix is added: the FFN's down projection, which has
several times as many inputs as the stream has dimensions, absorbs the gap, and its target is the dense residual stream.

Departures: tokens count by one over the squared norm of the stream that they are led to, since those that draw all
attention are a thousand times larger than others; the ridge pulls to the weight as it was; ridge and mixture are chosen
on windows that are not fitted to, linear by linear (before a gap by the model's loss), and the whole is taken back if
the loss on them did not fall. Behind a stage that fitted weights itself these are windows that it has not seen either:
on those that it has seen a repair looks better than it is.
"""

import logging
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core.axis import Kind
from compresso.core.counted import counted
from compresso.core.repair import tokens_wanted
from compresso.core.row import Row
from compresso.errors import CheckpointError, DataError, RecipeError
from compresso.job import Job
from compresso.stage import Effects, Passes, stage
from compresso.sweep.activation_store import Place
from compresso.sweep.audit import audit, digest, fingerprints
from compresso.sweep.calibration import Calibration
from compresso.sweep.journal import Journal
from compresso.sweep.least_squares import Fit
from compresso.sweep.lost import Lost, Refit, lost
from compresso.sweep.repair import Calibrated, repair_
from compresso.training.noise import mixed_seed

log = logging.getLogger(__name__)


@stage(
    "repair",
    title="fits what is left, by least squares, to make up for what left",
    paper="2403.12983",
    effects=Effects.WEIGHTS,
    needs=("data",),
    when=(
        "Behind anything that removes heads, channels, sub-layers or layers, before recovery or in its place; `repair:"
        " residual` among a selector's knobs puts it there. The dense model must fit beside the smaller one."
    ),
    failures=(
        "Calibration of one kind of text: every other kind pays, so mix them. Fewer than eight tokens for each fitted"
        " input: the fit learns their noise."
    ),
    any_task=True,
)
class Repair:
    """Knobs of the repair.

    Args:
        target: "residual", the dense residual stream, or "input", what the dense sub-layer makes of the smaller model's
            stream.
        alphas: shares of the residual target to choose from; the rest is that of "input".
        ridges: to choose from, shares of the mean diagonal of the second moment.
        examples: calibration rows at most, drawn without repetition.
        held: share of them that is held out, to choose by.
        batch: rows a forward pass.
        activations: where the states between two blocks are kept: "device", "cpu" or "disk".
        refit: "before", what stands before something that left whole, "gaps", these and what lost inputs, or "behind",
            everything from the first of these on.
        tokens: "weighted" by one over the squared norm of the stream that they are led to, those that draw attention
            more, or "alike".
        pull: what the ridge pulls to, the "old" weight or "zero".
    """

    target: Literal["residual", "input"] = "residual"
    alphas: tuple[Annotated[float, Ge(0), Le(1)], ...] = (0.0, 0.5, 1.0)
    ridges: tuple[Annotated[float, Gt(0)], ...] = (0.03, 0.3, 3.0)
    examples: Annotated[int, Ge(2)] = 128
    held: Annotated[float, Gt(0), Lt(1)] = 0.2
    batch: Annotated[int, Ge(1)] = 8
    activations: Place = "device"
    refit: Refit = Refit.GAPS
    tokens: Literal["weighted", "alike"] = "weighted"
    pull: Literal["old", "zero"] = "old"

    def __post_init__(self) -> None:
        """Refuse a choice among nothing."""
        if not self.alphas or not self.ridges:
            raise ValueError(f"alphas={list(self.alphas)}, ridges={list(self.ridges)}: give at least one of each")

    def check(self, model: PreTrainedModel, arch: Arch) -> None:
        """Raise RecipeError for mixtures of experts, whose stacks show no inputs to fit by."""
        if any(axis.kind == Kind.EXPERT for axis in arch.axes(model)):
            raise RecipeError(
                "repair fits single linears by what they read, and the experts of this model are stacked. Take"
                " another recipe, or a copy of this one without its repair (`compresso recipes` shows it)"
            )

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """Two looks at every block and one step behind it, if all of them lost something; beside them the dense model's
        own, and the loss before and after on what is held out. Each gap takes that loss once a ridge and once before.
        """
        last = 1 / len(arch.blocks(model))  # behind the last fitted block nothing is run
        own = Passes("calibration", self.examples, 3 - last + 2 * self.held)
        looks = 1 + 2 * (self.target == "input" or any(alpha < 1 for alpha in self.alphas))
        return [own, Passes("calibration", self.examples, looks, dense=True)]

    def __call__(self, job: Job) -> Job:
        """Find what left, fit, and take it back if the held-out loss did not fall."""
        if job.original is None:
            raise CheckpointError("a repair needs the dense model, and this job names none; set Job.original")
        dense = job.original(job.model.dtype, job.device).requires_grad_(False).eval()
        kept = job.plan.kept
        layers = kept.get("layers", tuple(range(len(job.arch.blocks(dense)))))
        dimensions = kept.get("hidden")
        gone = lost(dense, job.model, job.arch, layers, dimensions is not None, self.refit)
        seen, held = self._rows(job)
        told = self._said(job, gone, sum(len(row["input_ids"]) for row in seen)) | {"held_unseen": bool(job.unseen())}
        if not gone.consumers:
            return job.note("repair", **told, applied=False, linears={})
        calibration = Calibration(max(len(seen), len(held)), self.batch)
        data = Calibrated(
            calibration.batches(seen, 0), calibration.batches(held, 0), self.activations, job.out / "activations"
        )
        job.ranks.warn_of_idle("repair", len(data.seen))
        before = fingerprints(job.weights.tensors())
        ids = digest([[batch.tolist() for batch in batches] for batches in (data.seen, data.held)])
        journal = Journal(job.out, {**job.same("repair", self, before), "calibration": ids})
        old = {name: job.model.get_parameter(name).detach().clone() for name in _weights(gone)}

        def held_loss() -> float:
            return job.task.score(job.model, held).mean

        before_loss = held_loss()
        fit = Fit(
            self.target == "residual", self.alphas, self.ridges, self.tokens == "weighted", to_old=self.pull == "old"
        )
        linears = repair_(
            dense,
            job.model,
            job.arch,
            gone,
            layers,
            dimensions,
            data,
            fit,
            held_loss,
            journal=journal,
            progress=job.progress(),
            ranks=job.ranks,
        )
        after = held_loss()
        if helped := job.ranks.agreed(after < before_loss):
            changed = audit(job.weights.tensors(), before, [one.module for one in gone.consumers])["changed"]
        else:
            changed = 0
            for name, weight in old.items():
                job.model.get_parameter(name).detach().copy_(weight)
        self._tell(job, linears, before_loss, after, helped)
        return job.note(
            "repair", **told, applied=helped, changed=changed, held_out_loss=[before_loss, after], linears=linears
        )

    def _rows(self, job: Job) -> tuple[list[Row], list[Row]]:
        """Rows to fit to, and rows to choose by, spread over the data: of those that no stage has fitted to, where some
        are left. Raises DataError for fewer than two.
        """
        n = min(len(job.rows), self.examples)
        if n < 2:
            raise DataError(
                f"{counted(n, 'calibration example')}: a repair is fitted to some and chosen by others; give at least 2"
            )
        generator = torch.Generator().manual_seed(mixed_seed("repair", job.seed))
        order = torch.randperm(len(job.rows), generator=generator).tolist()
        n_held = min(max(1, round(n * self.held)), n - 1)
        unseen = job.unseen()
        held = [i for i in order if i in unseen][:n_held] if unseen else order[:n_held]
        seen = [i for i in order if i not in unseen and i not in held][: n - len(held)]
        return [job.rows[i] for i in sorted(seen)], [job.rows[i] for i in sorted(held)]

    def _said(self, job: Job, gone: Lost, tokens: int) -> dict[str, Any]:
        """Facts of the data and of what nothing can make up for; logged where they are a reason to worry."""
        loud = not job.quiet and job.ranks.is_main
        columns = max((one.columns for one in gone.consumers), default=0)
        wanted = tokens_wanted(columns)
        if tokens < wanted and loud:
            log.warning(
                "repair: %d calibration tokens for the %d inputs of one linear; %d of them would do, eight for each",
                tokens,
                columns,
                wanted,
            )
        alone = [f"{place.layer}.{place.kind}" for place in gone.unabsorbed]
        if alone and loud:
            log.warning("repair: %s left with nothing before it; nothing makes up for it", ", ".join(alone))
        if not gone.consumers and loud:
            log.warning("repair: nothing that is left lost inputs or stands before a gap; nothing is fitted")
        return {"target": self.target, "calibration_tokens": tokens, "tokens_wanted": wanted, "unabsorbed": alone}

    def _tell(self, job: Job, linears: dict[str, dict[str, Any]], loss: float, after: float, helped: bool) -> None:
        """Log what came of it."""
        if job.quiet or not job.ranks.is_main:
            return
        fitted = sum(bool(facts["applied"]) for facts in linears.values())
        if helped:
            log.info("repair: %d of %d linears, held-out loss %.4f -> %.4f", fitted, len(linears), loss, after)
        else:
            log.warning(
                "repair: the held-out loss would go from %.4f to %.4f, so the repair is not applied", loss, after
            )


def _weights(gone: Lost) -> list[str]:
    """Names of the weights that a repair may change."""
    return [f"{one.module}.weight" for one in gone.consumers]
