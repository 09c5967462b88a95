"""ZipLM's distillation: the smaller model learns the dense one's logits and its hidden states, token by token (Kurtic,
Frantar and Alistarh, arXiv 2302.04089, section 3.3 and appendix).

    loss = hard_weight x label loss + kl_weight x KL(dense || smaller) + token_weight x token loss

The token loss is the mean, over the layers that are left and over all positions but padding, of the squared difference
between the states of a layer in both models: structured removal leaves the width of the stream, so that nothing is
learned in between. A layer is compared with the one that it was (`sparse_finetune`, SquareHead's paper, compares with
the last before the next), and the last with the last. In a gradual run it stands behind each cut: `rounds` of `ziplm`.

Departures. `norm: global` divides a layer's term by the mean square of the dense states, as SquareHead does (arXiv
2310.06927), since states of different layers differ in size by orders of magnitude; `none` is the paper's, of which the
mean over the width is taken, too. Students that lost hidden dimensions compare those that are left. The last layer is
compared behind the final norm where the family has one. The temperature is 1; the paper names none. All weights learn,
in float32.

Defaults are the paper's for BERT: weights 0, 1 and .5, rate 8e-5, linear, weight decay .03. For GPT-2 it has 1e-3 and a
loss that labels decide.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt
from torch import nn
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core.squarehead import Norm
from compresso.job import Job
from compresso.stage import AdamW, Effects, Learning, Passes, Trains, Watches, stage
from compresso.stage.tuning import frozen_teacher, group_of, learner, settled, shards_of, tune, watching
from compresso.training.history import curve
from compresso.training.squarehead_objective import SquareHeadObjective


@stage(
    "token_distill",
    title="trains the smaller model on the dense model's logits and hidden states, token by token",
    paper="2302.04089",
    effects=Effects.WEIGHTS,
    needs=("data", "gradients", "training"),
    when=(
        "Behind a removal that leaves the width of the stream, such as `ziplm` in rounds, where all weights may learn"
        " and the dense model fits beside the smaller one."
    ),
    failures=(
        "All weights learn: a rate for adapters is far too high. Under `norm: none` the largest states, of late layers"
        " and of tokens that draw all attention, decide alone."
    ),
    any_task=True,
)
class TokenDistill:
    """Knobs of token distillation.

    Args:
        trains, adamw, watches: see `Trains`, `AdamW` and `Watches`.
        weight_decay: of AdamW.
        hard_weight: of the loss on labels.
        kl_weight: of the divergence from the dense model's logits; 0 computes none of them.
        token_weight: of the mean over layers of the hidden states' difference.
        norm: what that is relative to; see `compresso.core.squarehead`.
        temperature: of the divergence.
        tokens: where logits are compared, "labelled" or "all".
        chunk: tokens whose logits exist at a time.
        teacher_dtype, teacher_device: as in `distill`.
    """

    trains: Trains = Trains(steps="8 epochs", batch=16, micro_batch=8)
    adamw: AdamW = AdamW(lr=8e-5, lr_schedule="linear")
    watches: Watches = Watches()
    weight_decay: Annotated[float, Ge(0)] = 0.03
    hard_weight: Annotated[float, Ge(0)] = 0.0
    kl_weight: Annotated[float, Ge(0)] = 1.0
    token_weight: Annotated[float, Ge(0)] = 0.5
    norm: Norm = "global"
    temperature: Annotated[float, Gt(0)] = 1.0
    tokens: Literal["labelled", "all"] = "labelled"
    chunk: Annotated[int, Ge(1)] = 512
    teacher_dtype: Literal["same", "bf16", "fp32"] = "same"
    teacher_device: Literal["same", "cpu"] = "same"

    def __post_init__(self) -> None:
        """Refuse a loss without a teacher, or of nothing. Raises ValueError."""
        if not (self.kl_weight or self.token_weight):
            raise ValueError(
                "kl_weight=0 and token_weight=0 ask nothing of the dense model; give one of them, or the stage recover"
                " with train: all"
            )

    def learning(self) -> Learning:
        """All weights, under a teacher."""
        return Learning(self.trains, [self.trains.steps], None, teacher=True, chunk=self.chunk, spreads=True)

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """The passes of the training, and the teacher's."""
        return self.learning().passes()

    def __call__(self, job: Job) -> Job:
        """Reopen the dense model and train all weights towards it."""
        (total,) = self.trains.updates(len(job.rows))
        stored = job.model.eval().dtype
        teacher = frozen_teacher(job, self.teacher_dtype, self.teacher_device)
        model = learner(job, None)
        learning = group_of("all", model, self.adamw, job.model.config.hidden_size, total, self.weight_decay)
        watch = watching(job, self.watches, total)
        objective = self._objective(job, model, teacher)
        shards = shards_of(job, teacher)
        history = tune(job, "token_distill", self.trains, objective, [learning], total, watch=watch, shards=shards)
        facts = {"updates": total, "trainable": learning.numbers, "lr": learning.lr, "curve": curve(history)}
        facts |= watch.facts() if watch else {}
        return settled(job, model, stored, "token_distill", self.trains).note("token_distill", **facts)

    def _objective(self, job: Job, model: nn.Module, teacher: PreTrainedModel) -> SquareHeadObjective:
        """The loss, with the layers and hidden dimensions that are left."""
        ours, theirs = list(job.arch.blocks(job.model)), job.arch.blocks(teacher)
        kept, dimensions = job.plan.kept.get("layers", range(len(theirs))), job.plan.kept.get("hidden")
        return SquareHeadObjective(
            model,
            job.task.halves(job.model, ()),
            job.task.halves(teacher, [theirs[i] for i in kept] if self.token_weight else ()),
            ours,
            compare=job.task.compare,
            dimensions=None if dimensions is None else torch.tensor(dimensions),
            norm=self.norm,
            hard_weight=self.hard_weight,
            kl_weight=self.kl_weight,
            feature_weight=self.token_weight / len(ours),  # the objective sums over layers
            temperature=self.temperature,
            tokens=self.tokens,
            chunk=self.chunk,
        )
