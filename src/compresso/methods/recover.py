"""LoRA recovery: adapters trained on the already smaller model, then merged (Hu et al., arXiv 2106.09685; LLM-Pruner's
third stage, arXiv 2305.11627, section 3.3; Compresso's optional fine-tuning with frozen masks, arXiv 2310.05015).

After Compresso the masks are folded into the weights, so they are frozen by construction. Departure from Compresso's
script: adapters start fresh on merged weights instead of going on with those of mask training, so recovery can follow
any pruning.
"""

from collections.abc import Sequence
from typing import Literal

from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.arch.context import width_of
from compresso.job import Job
from compresso.stage import AdamW, Effects, Learning, Passes, Trains, TunesLora, Watches, stage
from compresso.stage.tuning import group_of, learner, settled, tune, watching
from compresso.training.history import curve
from compresso.training.objectives import LossObjective


@stage(
    "recover",
    title="LoRA fine-tuning of the smaller model, merged into its weights",
    paper="2106.09685",
    effects=Effects.WEIGHTS,
    needs=("data", "gradients", "training"),
    when="After any removal; worth most where much was removed.",
    failures=(
        "Instruction-only data ruins plain-text perplexity: mix text in. Too high a rate shows as a rising held-out"
        " loss."
    ),
    any_task=True,
)
class Recover:
    """Knobs of LoRA recovery.

    Args:
        trains, lora, adamw, watches: see `Trains`, `TunesLora`, `AdamW` and `Watches`.
        train: "lora" adapters, merged at the end, or "all" weights (in float32 while they learn; wants a lower lr).
    """

    trains: Trains = Trains()
    train: Literal["lora", "all"] = "lora"
    lora: TunesLora = TunesLora()
    adamw: AdamW = AdamW()
    watches: Watches = Watches()

    def learning(self) -> Learning:
        """Adapters, or all weights."""
        return Learning(self.trains, [self.trains.steps], self.lora if self.train == "lora" else None)

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """The passes of the training."""
        return self.learning().passes()

    def __call__(self, job: Job) -> Job:
        """Train adapters and merge them, or train weights."""
        (total,) = self.trains.updates(len(job.rows))
        stored = job.model.dtype
        model = learner(job, self.lora if self.train == "lora" else None)
        learning = group_of(self.train, model, self.adamw, width_of(job.model.config), total)
        watch = watching(job, self.watches, total)
        history = tune(job, "recover", self.trains, LossObjective(model, job.task.loss), [learning], total, watch=watch)
        return settled(job, model, stored, "recover", self.trains).note(
            "recover",
            updates=total,
            trainable=learning.numbers,
            lr=learning.lr,
            curve=curve(history),
            **(watch.facts() if watch else {}),
        )
