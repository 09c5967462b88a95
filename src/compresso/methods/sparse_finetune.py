"""Fine-tuning that keeps zeros, under SquareHead's loss (Kurtic et al., arXiv 2310.06927).

Section 2: weights that pruning set to 0 stay 0; all others learn. Each is set back after every update, so that neither
    momentum nor weight decay moves it, bit for bit.
Section 3: the label loss, plus the squared differences of hidden states from the dense model's, relative to how large
    these are, summed over layers; a divergence of logits by choice. See `compresso.training.squarehead_objective`.

The teacher is the model that the run started from; the paper's was fine-tuned on the task before, which a stage
`finetune` or another run does. No gradient is clipped, as published: a norm would count gradients of zeros.

Departures. Every zero of a block's linear stays (`masks: all`); the authors' code guesses which linears were pruned by
a tenth of zeros and lets those of others grow (`masks: infer`). Students that lost layers compare each of theirs with
the teacher's last layer before their next, and the last with the last; students that lost hidden dimensions compare
those that are left. All weights learn in float32.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import nn
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core.squarehead import Norm
from compresso.edit.zeros import INFERRED, Zeros
from compresso.errors import RecipeError
from compresso.job import Job
from compresso.stage import AdamW, Effects, Learning, Passes, Trains, Watches, stage, zeroing
from compresso.stage.tuning import frozen_teacher, group_of, learner, settled, tune, watching
from compresso.sweep.targets import Where, chosen
from compresso.training.history import curve
from compresso.training.squarehead_objective import SquareHeadObjective


@stage(
    "sparse_finetune",
    title="trains the weights that are left, and zeros stay zeros",
    paper="2310.06927",
    effects=Effects.WEIGHTS,
    needs=("data", "gradients", "training"),
    when="Behind `sparsegpt`, `wanda` or `magnitude` at half the weights and more; the dense model must fit beside it.",
    failures=(
        "Zeros make no file smaller and no plain engine faster. A rate for adapters is far too high for all weights; at"
        " high sparsity the label loss alone overfits, which the held-out loss shows."
    ),
    any_task=True,
)
class SparseFinetune:
    """Knobs of fine-tuning with zeros.

    Args:
        trains, adamw, watches: see `Trains`, `AdamW` and `Watches`.
        weight_decay: of AdamW.
        hard_weight: of the loss on labels.
        kl_weight: of the divergence from the dense model's logits; 0 computes none of them.
        feature_weight: of SquareHead's sum over layers; 0 runs no teacher if `kl_weight` is 0, too.
        norm: what a squared difference is relative to; see `compresso.core.squarehead`.
        temperature: of the divergence.
        tokens: where logits are compared, "labelled" or "all".
        masks: "all" zeros of the blocks' linears and stacked experts stay, or "infer": those of linears, or of stacks,
            with a tenth of them.
        chunk: tokens whose logits exist at a time.
        teacher_dtype, teacher_device: as in `distill`.
    """

    trains: Trains = Trains(steps="2 epochs", batch=32, micro_batch=8)
    adamw: AdamW = AdamW(lr=3e-5, lr_schedule="linear", warmup=20, clip=None)
    watches: Watches = Watches()
    weight_decay: Annotated[float, Ge(0)] = 0.0
    hard_weight: Annotated[float, Ge(0)] = 1.0
    kl_weight: Annotated[float, Ge(0)] = 0.0
    feature_weight: Annotated[float, Ge(0)] = 1.0
    norm: Norm = "global"
    temperature: Annotated[float, Gt(0)] = 1.0
    tokens: Literal["labelled", "all"] = "labelled"
    masks: Literal["all", "infer"] = "all"
    chunk: Annotated[int, Ge(1)] = 512
    teacher_dtype: Literal["same", "bf16", "fp32"] = "same"
    teacher_device: Literal["same", "cpu"] = "same"

    def __post_init__(self) -> None:
        """Refuse a loss of nothing. Raises ValueError."""
        if not (self.hard_weight or self.kl_weight or self.feature_weight):
            raise ValueError("hard_weight=0, kl_weight=0, feature_weight=0: nothing is minimised; give one of them")

    @property
    def _taught(self) -> bool:
        return bool(self.kl_weight or self.feature_weight)

    def learning(self) -> Learning:
        """All weights, under a teacher where something is compared with it."""
        return Learning(self.trains, [self.trains.steps], None, teacher=self._taught, chunk=self.chunk)

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """The passes of the training, and the teacher's."""
        return self.learning().passes()

    def __call__(self, job: Job) -> Job:
        """Note the zeros, train, set them back after each update."""
        zeros = self.check_zeros(job)
        (total,) = self.trains.updates(len(job.rows))
        stored = job.model.eval().dtype
        teacher = self._teacher(job)
        model = learner(job, None)
        learning = group_of("all", model, self.adamw, job.model.config.hidden_size, total, self.weight_decay)
        watch = watching(job, self.watches, total)

        def back_to_zero(_: int) -> Mapping[str, float] | None:
            zeros.restore_(job.model)
            return None

        objective = self._objective(job, model, teacher)
        history = tune(
            job, "sparse_finetune", self.trains, objective, [learning], total, after_update=back_to_zero, watch=watch
        )
        zeros.restore_(job.model)
        facts = {
            "updates": total,
            "trainable": learning.numbers,
            "zeros": sum(zeros.counted.values()),
            "linears": len(zeros.masks),
            "lr": learning.lr,
            "curve": curve(history),
            **(watch.facts() if watch else {}),
        }
        return settled(job, model, stored, "sparse_finetune", self.trains).note("sparse_finetune", **facts)

    def check_zeros(self, job: Job) -> Zeros:
        """Those that stay. Raises RecipeError if there are none."""
        groups = chosen(job.model, job.arch, Where(), experts=True)
        weights = dict.fromkeys(name for here in groups.values() for group in here for name in group.weights)
        zeros = Zeros.of(job.model, list(weights), INFERRED if self.masks == "infer" else 0.0)
        if not zeros.masks:
            able = zeroing(any_task=not job.task.writes_text)
            least = "a tenth of its weights 0" if self.masks == "infer" else "a weight that is 0"
            raise RecipeError(
                f"sparse_finetune: no linear of the blocks has {least}; put {_either(able)} before it, or start from a"
                " checkpoint whose weights are zeros in part"
            )
        return zeros

    def _teacher(self, job: Job) -> PreTrainedModel | None:
        """The dense model, if something is compared with it."""
        if not self._taught:
            return None
        cure = "set Job.original, or feature_weight: 0 and kl_weight: 0"
        return frozen_teacher(job, self.teacher_dtype, self.teacher_device, cure)

    def _objective(self, job: Job, model: nn.Module, teacher: PreTrainedModel | None) -> SquareHeadObjective:
        """The loss, with the layers and hidden dimensions that are left."""
        dimensions = job.plan.kept.get("hidden")
        theirs = None
        if teacher is not None:
            blocks = job.arch.blocks(teacher)
            pairs = paired(job.plan.kept.get("layers", tuple(range(len(blocks)))), len(blocks))
            theirs = job.task.halves(teacher, [blocks[i] for i in pairs] if self.feature_weight else ())
        return SquareHeadObjective(
            model,
            job.task.halves(job.model, ()),
            theirs,
            list(job.arch.blocks(job.model)),
            compare=job.task.compare,
            dimensions=None if dimensions is None else torch.tensor(dimensions),
            norm=self.norm,
            hard_weight=self.hard_weight,
            kl_weight=self.kl_weight,
            feature_weight=self.feature_weight,
            temperature=self.temperature,
            tokens=self.tokens,
            chunk=self.chunk,
        )


def _either(names: Sequence[str]) -> str:
    """Names with "or" before the last.

    >>> _either(["owl", "qat", "wanda"])
    'owl, qat or wanda'
    """
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def paired(kept: Sequence[int], layers: int) -> list[int]:
    """The teacher's layer that each of the student's is compared with: the last before the student's next.

    >>> paired((0, 1, 4, 5), 8)
    [0, 3, 4, 7]
    """
    return [after - 1 for after in (*kept[1:], layers)]
