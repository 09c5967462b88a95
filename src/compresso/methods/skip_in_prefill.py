"""ShortGPT-gen: the least influential layers are skipped while the prompt is read, and run for every token after it
(arXiv 2403.03853).

Plain removal ruins open-ended generation; skipping in the prefill alone keeps decoding dense. Layers are chosen by
block influence, as in `drop_layers`. What it saves is time to the first token; memory and decoding stay as they were. A
scored text goes through the patched prefill, so perplexities are those of the shorter model.

Departures: keys of skipped layers are rotated before they are cached (the public code caches them unrotated, so that
attention mixes two kinds); a share of layers is never exceeded, as in `drop_layers`.

The result's files are the dense model's: no format can say that a layer runs for some tokens only. `compresso.load`
applies the patch that the records name; other engines open the dense model.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

from annotated_types import Gt, Le
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core.axis import Kind
from compresso.edit.prefill import prefill_patch
from compresso.job import Job
from compresso.observe.influence import block_influence
from compresso.solve.depth import drop_lowest
from compresso.stage import Calibrates, Effects, Passes, stage


@stage(
    "skip_in_prefill",
    title="skips the layers that turn the residual stream least while a prompt is read; decoding stays dense",
    paper="2403.03853",
    effects=Effects.FORWARD,
    needs=("data",),
    when="Long prompts and short answers, where time to the first token counts; nothing becomes smaller.",
    failures=(
        "Only `compresso.load` applies it: other engines run all layers. Answers that hinge on the prompt's details"
        " suffer first."
    ),
)
class SkipInPrefill:
    """Knobs of ShortGPT-gen.

    Args:
        skip: share of the layers that prompts pass by, rounded down.
        calibrates: see `Calibrates`.
    """

    skip: Annotated[float, Gt(0), Le(0.9)] = 0.3
    calibrates: Calibrates = Calibrates()

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """One pass over the calibration data."""
        return [Passes("calibration", self.calibrates.examples)]

    def __call__(self, job: Job) -> Job:
        """Score, choose, patch."""
        axis = next(axis for axis in job.arch.axes(job.model) if axis.kind == Kind.LAYER)
        calibration = self.calibrates.read(job.batches(self.calibrates.batch, "skip_in_prefill"))
        how = job.observing("scores", job.same("skip_in_prefill", self))
        blocks, axes = job.arch.blocks(job.model), job.arch.axes(job.model)
        found = block_influence(job.model, blocks, axes, (Kind.LAYER,), calibration, how)
        n = int(self.skip * axis.size + 1e-9)
        kept = drop_lowest([axis], found.scores, n).kept[axis.name]
        skipped = sorted(set(range(axis.size)) - set(kept))
        patch = prefill_patch(skipped)
        patch.apply_(job.model)
        facts = {
            "skipped": skipped,
            "layers": axis.size,
            "scores": found.scores[axis.name].tolist(),
            "calibration_tokens": found.tokens,
        }
        return replace(job, patches=(*job.patches, patch)).note("skip_in_prefill", **facts)
