"""Fine-tuning of the dense model: all weights, and where the task wants a head and there is none, a new one with them
(Devlin et al., arXiv 1810.04805, section 3).

What it leaves is the dense model of the run: a pruned one is taught by it and compared with it. AdamW with warm-up and
linear decay, no decay of norms and biases, dropout as the model's config has it, as in BERT's code. Departure: AdamW's
moments are corrected for their start at zero; short fine-tuning without the correction is unstable (arXiv 2006.05987).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, cast

import torch
from annotated_types import Ge
from torch import nn
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core import schedule
from compresso.edit.precision import cast_
from compresso.job import Job
from compresso.stage import AdamW, Effects, Knobs, Learning, Passes, Trains, stage
from compresso.stage.tuning import tune
from compresso.training.groups import Group
from compresso.training.history import curve
from compresso.training.objectives import LossObjective


@stage(
    "finetune",
    title="trains all weights of the dense model, and a new head where the task wants one",
    paper="1810.04805",
    effects=Effects.WEIGHTS,
    needs=("data", "gradients", "training"),
    when="First, where a base model has no head for the task; a run puts it there by itself.",
    failures=(
        "Too high a rate, or too few examples, shows as an accuracy near that of the most frequent label; then nothing"
        " that follows can be judged."
    ),
    any_task=True,
    makes_dense=True,
)
class Finetune:
    """Knobs of fine-tuning.

    Args:
        trains, adamw: see `Trains` and `AdamW`.
        weight_decay: AdamW's, of all but norms and biases.
    """

    trains: Annotated[Trains, Knobs(without=("save_adapter",))] = Trains(steps="3 epochs", batch=32, micro_batch=32)
    adamw: Annotated[AdamW, Knobs(without=("lr_at_hidden",))] = AdamW(lr=5e-5, lr_schedule="linear", warmup=20)
    weight_decay: Annotated[float, Ge(0)] = 0.01

    def learning(self) -> Learning:
        """All weights."""
        return Learning(self.trains, [self.trains.steps], None)

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """The passes of the training."""
        return self.learning().passes()

    def __call__(self, job: Job) -> Job:
        """Give the model a head if it lacks one, train everything."""
        (total,) = self.trains.updates(len(job.rows))
        stored, new_head = job.model.dtype, job.task.lacks_head(job.model.config)
        headed = job.task.with_head(job.model, job.labels, job.seed) if new_head else job.model
        # small updates of all weights would be rounded away in half precision
        model = cast_(cast(nn.Module, headed), torch.float32).requires_grad_(True)
        lr, clip = self.adamw.lr, self.adamw.clip
        rate = schedule.rate(self.adamw.lr_schedule, total, min(self.adamw.warmup, max(total - 1, 0)))
        weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
        others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
        groups = [
            Group("weights", weights, lr, rate, clip=clip, weight_decay=self.weight_decay),
            Group("norms and biases", others, lr, rate, clip=clip),
        ]
        objective = LossObjective(model, job.task.loss)
        history = tune(replace(job, model=headed), "finetune", self.trains, objective, groups, total)
        trained = cast(Any, cast_(model, stored)).requires_grad_(False).eval()
        facts: dict[str, Any] = {
            "updates": total,
            "trainable": sum(parameter.numel() for parameter in trained.parameters()),
            "lr": lr,
            "new_head": (list(job.labels) or [job.task.head]) if new_head else None,
            "curve": curve(history),
        }
        return replace(job, model=trained).note("finetune", **facts)
