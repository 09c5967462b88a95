"""SliceGPT: the residual stream is rotated, before each half of a layer, to its principal directions, and the least of
them are deleted (Ashkboos et al., arXiv 2401.15024).

Section 3.1, computational invariance: gains of norms go into the linears behind them, LayerNorm becomes RMSNorm once
    what writes to the stream has lost its mean, and then a rotation Q of the stream changes nothing.
Section 3.2: each half of a layer has a Q of its own, so that what is added to is first multiplied by the shortcut
    Q_l^T Q_{l+1}.
Section 3.3: Q_l are the eigenvectors of the stream's second moment on calibration data, in float64, block after block
    on what the sliced blocks before give; the columns of the smallest eigenvalues are deleted, and shortcuts are
    [width, width] then. `compresso.sweep.slicing` finds them.

What is written. No stock class has shortcuts, and neither has any engine's format. So a run leaves the weights as they
are and patches the forward pass: the stream is cut to the span of what is left of Q_l, in its own basis, which computes
what the narrower model computes. `compresso export --format sliced` folds, centres, rotates and cuts the weights, in
float64, and writes the narrower model with a modelling file of ours, opened by transformers alone. A later stage of the
run (recovery) trains the weights under the patch, and is exported with them.

Sizes. Shortcuts are 2 width^2 numbers a layer, and the head cannot be tied to the embedding, since they lie in other
bases: both are counted before weights are read, and a width at which the model would not be smaller is refused.
SmolLM2-135M, with a tied head and a narrow stream, grows at 10 and 20 %.

Departures: norms keep the model's own epsilon (the authors' code has 1e-5 for all). The stream is sliced before the
head, too, as `slice_head: false` undoes (the authors' code does not slice there unless told). The kept directions are
not multiplied by a random rotation afterwards, which changes no function and spreads outliers for rounding. Examples
are the run's; the paper takes 1,024 rows of 2,048 tokens, the authors' script 128. Layers differ in no width, as the
paper's schedule by layer is left out. Damping turns no direction that the data knows; it is
kept as in the authors' code.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.arch.sliceable import Counts, dense_macs, sliceable, sliced_counts, stream_width
from compresso.core.slicing import sliced_width
from compresso.edit.slice_stream import slice_stream_patch
from compresso.errors import RecipeError
from compresso.job import Job
from compresso.stage import Effects, Passes, stage
from compresso.sweep.activation_store import Place
from compresso.sweep.audit import digest
from compresso.sweep.calibration import Calibration
from compresso.sweep.journal import Journal
from compresso.sweep.slicing import bases_of
from compresso.training.noise import mixed_seed

log = logging.getLogger(__name__)


@stage(
    "slicegpt",
    title="cuts the residual stream to its principal directions, so that every matrix can lose rows or columns",
    paper="2401.15024",
    effects=Effects.FORWARD,
    needs=("data",),
    when="A wide model whose head is its own, cut by 20 to 30 % without training; attention and cache stay whole.",
    failures=(
        "Small models with tied embeddings grow. Saves nothing before compresso export --format sliced, which"
        " transformers alone opens; shortcuts may take the time that narrower matrices save."
    ),
)
class SliceGPT:
    """Knobs of the slicing.

    Args:
        keep: share of the stream's dimensions that stay, rounded down; 1 rotates and deletes nothing.
        multiple_of: the width that stays is one of this.
        slice_head: delete before the head, too; else its stream stays whole.
        damping: share of the second moment's mean diagonal that is added to it.
        only_if_smaller: refuse a width at which shortcuts and a head of its own make up for what is deleted.
        examples: calibration rows at most, drawn without repetition.
        batch: rows a forward pass.
        activations: where the states between two blocks are kept: "device", "cpu" or "disk".
    """

    keep: Annotated[float, Gt(0), Le(1)] = 0.8
    multiple_of: Annotated[int, Ge(1)] = 8
    slice_head: bool = True
    damping: Annotated[float, Ge(0), Le(0.1)] = 0.01
    only_if_smaller: bool = True
    examples: Annotated[int, Ge(1)] = 128
    batch: Annotated[int, Ge(1)] = 8
    activations: Place = "device"

    def check(self, model: PreTrainedModel, arch: Arch) -> Counts:
        """What the model has once it is sliced; needs shapes only. Raises RecipeError or ArchError."""
        if not (self.slice_head or sliceable(model, arch).whole_head):
            raise RecipeError(
                f"slice_head: the body of a {model.config.model_type} hands the head a stream as wide as its layers';"
                " set slice_head to true"
            )
        counts = self._counts(model, arch, self.keep)
        dense = dense_parameters(model)
        if self.only_if_smaller and counts.parameters >= dense:
            raise RecipeError(
                f"keep={self.keep:g} leaves {counts.parameters:,} parameters of {dense:,}: {counts.shortcuts:,} of them"
                f" are shortcuts and {counts.head:,} a head of its own; {self._cure(model, arch, dense)}, or set"
                " only_if_smaller to false"
            )
        return counts

    def remarks(self, model: PreTrainedModel, arch: Arch) -> list[str]:
        """How large the sliced model is, which no budget says."""
        counts, dense = self._counts(model, arch, self.keep), dense_parameters(model)
        macs = dense_macs(model, arch)
        tied = "; its embeddings are untied" if model.config.tie_word_embeddings else ""
        grows = "" if counts.parameters < dense else ", so that it GROWS"
        return [
            f"once exported as sliced it has {counts.parameters:,} parameters, {counts.parameters / dense:.1%} of"
            f" {dense:,}{grows}, and {counts.macs / macs:.1%} of the multiply-accumulates a token{tied};"
            f" {counts.shortcuts:,} of the parameters are shortcuts"
        ]

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """Each block runs for the stream inside it, and again for the one behind it."""
        return [Passes("calibration", self.examples, 2)]

    def __call__(self, job: Job) -> Job:
        """Find the bases and patch."""
        counts = self.check(job.model, job.arch)
        if not job.quiet and job.ranks.is_main:
            for sentence in self.remarks(job.model, job.arch):
                log.warning("slicegpt: %s", sentence)
        batches = Calibration(self.examples, self.batch).batches(job.rows, mixed_seed("slicegpt", job.seed))
        job.ranks.warn_of_idle("slicegpt", len(batches))
        same = {**job.same("slicegpt", self), "calibration": digest([batch.tolist() for batch in batches])}
        width, head_width = self._widths(job.model, job.arch, self.keep)
        found = bases_of(
            job.model,
            job.arch,
            batches,
            width,
            head_width,
            self.damping,
            place=self.activations,
            scratch=job.out / "activations",
            journal=Journal(job.out, same),
            progress=job.progress(),
            name="slicegpt",
            ranks=job.ranks,
        )
        patch = slice_stream_patch(found.bases, found.head)
        patch.apply_(job.model)
        dense = dense_parameters(job.model)
        facts: dict[str, Any] = {
            "calibration_examples": sum(map(len, batches)),
            "calibration_tokens": sum(batch.numel() for batch in batches),
            "stream_width": width,
            "head_width": head_width,
            "dense_width": stream_width(job.model, sliceable(job.model, job.arch)),
            "sliced_parameters": counts.parameters,
            "dense_parameters": dense,
            "sliced_macs": counts.macs,
            "dense_macs": dense_macs(job.model, job.arch),
            "shortcuts": counts.shortcuts,
            "untied": bool(job.model.config.tie_word_embeddings),
            "lost": [round(share, 8) for share in found.lost],
        }
        return replace(job, patches=(*job.patches, patch)).note("slicegpt", **facts)

    def _widths(self, model: PreTrainedModel, arch: Arch, keep: float) -> tuple[int, int]:
        """Dimensions that stay in the layers, and before the head. Raises RecipeError if none does."""
        dense = stream_width(model, sliceable(model, arch))
        width = sliced_width(dense, keep, self.multiple_of)
        if width < 1:
            raise RecipeError(
                f"keep={keep:g} of {dense} dimensions leaves no multiple of {self.multiple_of}; keep more, or give a"
                " smaller multiple_of"
            )
        return width, width if self.slice_head else dense

    def _counts(self, model: PreTrainedModel, arch: Arch, keep: float) -> Counts:
        """What is left at a share."""
        return sliced_counts(model, sliceable(model, arch), *self._widths(model, arch, keep))

    def _cure(self, model: PreTrainedModel, arch: Arch, dense: int) -> str:
        """The largest share, in hundredths, at which the model is smaller."""
        for hundredths in range(int(100 * self.keep), 0, -1):
            try:
                if self._counts(model, arch, hundredths / 100).parameters < dense:
                    return f"keep={hundredths / 100:g} or less is smaller"
            except RecipeError:
                break
        return "no share is smaller"


def dense_parameters(model: PreTrainedModel) -> int:
    """Parameters of the dense model, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
