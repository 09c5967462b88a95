"""LoRA recovery: adapters trained on the already smaller model, then merged (Hu et al., arXiv 2106.09685; LLM-Pruner's
third stage, arXiv 2305.11627, section 3.3; Compresso's optional fine-tuning with frozen masks, arXiv 2310.05015).

After Compresso the masks are folded into the weights, so they are frozen by construction. Departure from Compresso's
script: adapters start fresh on merged weights instead of going on with those of mask training, so recovery can follow
any pruning.
"""

from dataclasses import replace
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from compresso.core import schedule
from compresso.edit.lora import attach_, merge_
from compresso.edit.recompute import recompute_
from compresso.job import Effects, Job, curve, stage
from compresso.training.duration import Duration, shortened, updates
from compresso.training.fit import fit
from compresso.training.groups import Group
from compresso.training.objectives import LanguageObjective


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
)
class Recover:
    """Knobs of LoRA recovery.

    Args:
        steps: updates or epochs.
        batch, micro_batch: examples an update, and a forward pass.
        rank, alpha, targets, dropout: LoRA.
        lr, lr_schedule, warmup, clip: AdamW.
        lr_at_hidden: hidden size that `lr` is meant for; other widths scale it by (lr_at_hidden / hidden size)^0.75.
            None: as it is.
        checkpointing: recompute activations in the backward pass.
        save_adapter: also keep the adapter as it was before merging, in the result's folder `adapters`.
        precision: "auto", "no" or "bf16" autocast.
        max_steps: cap on the updates.
        save_every: updates between training checkpoints.
    """

    steps: Duration = 300
    batch: Annotated[int, Ge(1)] = 16
    micro_batch: Annotated[int, Ge(1)] = 16
    rank: Annotated[int, Ge(1)] = 8
    alpha: Annotated[float, Gt(0)] = 16.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    dropout: Annotated[float, Ge(0), Le(1)] = 0.0
    lr: Annotated[float, Ge(0)] = 5e-4
    lr_at_hidden: Annotated[int, Ge(1)] | None = None
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: Annotated[int, Ge(0)] = 0
    clip: Annotated[float, Ge(0)] | None = 1.0
    checkpointing: bool = False
    save_adapter: bool = False
    precision: Literal["auto", "no", "bf16"] = "auto"
    max_steps: Annotated[int, Ge(1)] | None = None
    save_every: Annotated[int, Ge(1)] = 50

    def __call__(self, job: Job) -> Job:
        """Train adapters, merge them."""
        (total,) = shortened([updates(self.steps, len(job.rows), self.batch)], self.max_steps)
        lora = attach_(job.model, self.rank, self.alpha, self.targets, self.dropout, job.seed)
        if self.checkpointing:
            recompute_(job.model, on=True)
        lr = schedule.rate_for_width(self.lr, self.lr_at_hidden, job.model.config.hidden_size)
        rate = schedule.rate(self.lr_schedule, total, min(self.warmup, max(total - 1, 0)))
        adapters = [parameter for parameter in lora.parameters() if parameter.requires_grad]
        history = fit(
            LanguageObjective(lora),
            [Group("lora", adapters, lr, rate, clip=self.clip)],
            job.batches(self.batch, "recover"),
            total,
            seed=job.seed,
            accumulation=job.accumulation(self.batch, self.micro_batch),
            precision=self.precision,
            device=job.device,
            checkpoints=job.checkpoints(),
            save_every=self.save_every,
            progress=job.progress(),
            phase=lambda update: "recover",
        )
        if self.checkpointing:
            recompute_(job.model, on=False)
        if self.save_adapter:
            job.keep_adapter(lora, "recover")
        trainable = sum(parameter.numel() for parameter in adapters)
        return replace(job, model=merge_(lora)).note(
            "recover", updates=total, trainable=trainable, lr=lr, curve=curve(history)
        )
