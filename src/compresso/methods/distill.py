"""Distillation: the smaller model learns to predict what the dense model predicts (Hinton et al., arXiv 1503.02531).

As Minitron (arXiv 2407.14679, section 3) uses it to retrain pruned models: the teacher is the model the run started
from, read once more; the loss is the divergence of next-token distributions alone, and by choice a label loss and a
distance between hidden states whose weight is scaled to the divergence at each step.

Departures. The loss is multiplied by the squared temperature (Hinton et al.; not in Minitron's code; nothing at
temperature 1). By default LoRA adapters learn, as in `recover`; Minitron trains all weights (`train: all`). Hidden
states are compared on the layers and hidden dimensions that are left, which the plan knows, instead of through a
learned projection; and after the layers, before the final norm.

`teacher: cached` is ours, too: the dense model is asked once, before training, and released. Of what it says of each
place that will be seen, the `teacher_top` largest log-probabilities and one bucket of all others are kept on disk. The
loss is the divergence over these buckets, a lower bound of the one over the whole vocabulary (`core/buckets.py`). How
far below it is, at up to 128 held-out places, is in the records as `teacher_gap`. 64 outcomes are a guess. Hidden
states are not kept. The cached teacher computes in its own dtype, also where training does so under autocast.

`teacher: FOLDER` is another model of pictures with the same classes (`training/other_teacher.py`), as arXiv 2309.02617
has a Swin teach a MobileViT; its logits alone are compared.
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import nn
from transformers import PreTrainedModel

from compresso.arch.base import Arch, arch_for
from compresso.arch.context import tokens_of_picture, width_of
from compresso.arch.costs import cost_of
from compresso.core.distillation import Divergence
from compresso.core.measures import NONE
from compresso.errors import RecipeError
from compresso.job import Job
from compresso.stage import AdamW, Effects, Foreign, Learning, Passes, Trains, TunesLora, Watches, stage
from compresso.stage.cached_teaching import CachedTeacher, Question, rows_seen
from compresso.stage.tuning import (
    check_routers,
    frozen_teacher,
    group_of,
    learner,
    router_numbers,
    settled,
    shards_of,
    tune,
    watching,
)
from compresso.training.cached_objective import CachedObjective, TaughtBatches
from compresso.training.distill_objective import DistillObjective
from compresso.training.history import curve
from compresso.training.other_teacher import (
    OWN,
    Sees,
    check_classes,
    check_teacher,
    how_it_sees,
    open_teacher,
    read_teacher,
    shaped_teacher,
)


@stage(
    "distill",
    title="trains the smaller model to predict what the dense model predicts",
    paper="1503.02531",
    effects=Effects.WEIGHTS,
    needs=("data", "gradients", "training"),
    when=(
        "Instead of `recover`, or after it, where the dense model fits beside the smaller one, and with"
        " `teacher: cached` where it does not; a step costs one more forward pass."
    ),
    failures=(
        "Without data like the dense model's own it teaches what the dense model thinks of foreign text. A temperature"
        " far above 1 teaches the tail of the vocabulary; a rising held-out loss shows either, or too high a rate."
    ),
    any_task=True,
)
class Distill:
    """Knobs of distillation.

    Args:
        trains, lora, adamw, watches: see `Trains`, `TunesLora`, `AdamW` and `Watches`.
        train: "lora" adapters, merged at the end, "all" weights (in float32 while they learn; wants a lower lr), or
            those of the "router" of each mixture alone; as in `recover`.
        divergence: "forward" KL(dense || smaller), "reverse", "js" (generalised Jensen-Shannon),
            or "mse": the mean squared difference of logits, of all outcomes and places.
        temperature: divides both models' logits.
        beta: the dense model's share of the mixture of "js".
        hard_weight: of the next-token loss on labels, beside the divergence.
        intermediate_weight: of the hidden states' distance, relative to the divergence; 0 compares none. For models
            that lost many layers.
        intermediate: that distance: "cosine" or "mse".
        tokens: which positions count: those that predict a "labelled" token, or "all" but padding.
        chunk: tokens whose logits exist at a time.
        teacher_dtype: "same" as the smaller model, "bf16" or "fp32".
        teacher_device: "same", or "cpu" where the device holds only the smaller model.
        teacher: "live" beside the smaller model, or "cached": asked once before, kept on disk, and never in memory
            together with the smaller one; for next tokens. Or a folder with another model of pictures, live beside it.
        teacher_top: of "cached": outcomes of each place that are kept by themselves; all others together are one.

    Raises ValueError for hidden states, or all logits, of a cached teacher.
    """

    trains: Trains = Trains()
    train: Literal["lora", "all", "router"] = "lora"
    lora: TunesLora = TunesLora()
    adamw: AdamW = AdamW()
    watches: Watches = Watches()
    divergence: Literal["forward", "reverse", "js", "mse"] = "forward"
    temperature: Annotated[float, Gt(0)] = 1.0
    beta: Annotated[float, Gt(0), Lt(1)] = 0.5
    hard_weight: Annotated[float, Ge(0)] = 0.0
    intermediate_weight: Annotated[float, Ge(0)] = 0.0
    intermediate: Literal["cosine", "mse"] = "cosine"
    tokens: Literal["labelled", "all"] = "labelled"
    chunk: Annotated[int, Ge(1)] = 512
    teacher_dtype: Literal["same", "bf16", "fp32"] = "same"
    teacher_device: Literal["same", "cpu"] = "same"
    teacher: str = "live"
    teacher_top: Annotated[int, Ge(1)] = 64

    def __post_init__(self) -> None:
        """Refuse what is not kept of a teacher."""
        if self.teacher == "cached" and self.divergence == "mse":
            raise ValueError("divergence=mse compares all logits, and a cached teacher keeps a few; give teacher: live")
        if self.teacher == "cached" and self.intermediate_weight:
            raise ValueError(
                f"intermediate_weight={self.intermediate_weight} compares hidden states, which are not kept of a cached"
                " teacher; give teacher: live, or intermediate_weight: 0"
            )
        if not self.teacher.strip():
            raise ValueError("teacher is empty; give live, cached, or the folder of a model of pictures")
        if self._other and self.intermediate_weight:
            raise ValueError(
                f"intermediate_weight={self.intermediate_weight} compares the stages of a model with those it came"
                f" from, and teacher={self.teacher} is another one; give teacher: live, or intermediate_weight: 0"
            )

    @property
    def _other(self) -> bool:
        """Whether another model than the dense one teaches."""
        return self.teacher not in OWN

    def check(self, model: PreTrainedModel, arch: Arch) -> None:
        """Refuse to keep anything but next tokens of a teacher, and routers where none are. Raises RecipeError."""
        if self.train == "router":
            check_routers(model)
        if self.teacher == "cached" and not model.can_generate():
            raise RecipeError(
                f"teacher=cached keeps next-token distributions, and a {model.config.model_type} model writes no text;"
                " give teacher: live"
            )
        if self._other:
            check_teacher(self.teacher, model.config)

    def check_labels(self, labels: Sequence[str]) -> None:
        """Refuse a teacher of other classes. Raises RecipeError."""
        if self._other:
            check_classes(self.teacher, labels)

    def remarks(self, model: PreTrainedModel, arch: Arch) -> list[str]:
        """What another teacher takes."""
        if not self._other:
            return []
        source, taught = open_teacher(self.teacher), _counted(self.teacher)
        return [
            f"{source.name} teaches in the place of the dense model: {taught.parameters:,} parameters in memory, and"
            f" {taught.macs:,} multiply-accumulates a picture"
        ]

    def learning(self) -> Learning:
        """Adapters, or all weights, under a teacher."""
        lora = self.lora if self.train == "lora" else None
        cached = self.teacher_top if self.teacher == "cached" else None
        own: dict[str, Any] = {"frozen": True, "own": router_numbers} if self.train == "router" else {}
        how: dict[str, Any] = {"teacher": True, "chunk": self.chunk, "cached": cached, "spreads": True, **own}
        how["other"] = partial(_counted, self.teacher) if self._other else None
        return Learning(self.trains, [self.trains.steps], lora, **how)

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """The passes of the training, and the teacher's."""
        return self.learning().passes()

    def __call__(self, job: Job) -> Job:
        """Reopen the dense model, train adapters or weights towards it or what it said, merge adapters."""
        (total,) = self.trains.updates(len(job.rows))
        stored = job.model.eval().dtype
        cached = self._asked(job, total) if self.teacher == "cached" else None
        before = cached and cached.gap(job.model, self._of_kept(), self.beta)
        teacher = None if cached else self._live(job)
        model = learner(job, self.lora if self.train == "lora" else None, routers=self.train == "router")
        learning = group_of(self.train, model, self.adamw, width_of(job.model.config), total)
        watch = watching(job, self.watches, total)
        objective = self._from_kept(job, model) if teacher is None else self._objective(job, model, teacher)
        batches = cached and TaughtBatches(job.batches(self.trains.batch, "distill"), cached.store)
        history = tune(
            job,
            "distill",
            self.trains,
            objective,
            [learning],
            total,
            batches=batches,
            watch=watch,
            shards=shards_of(job, teacher),
        )
        facts = {"updates": total, "trainable": learning.numbers, "lr": learning.lr, "curve": curve(history)}
        facts |= watch.facts() if watch else {}
        if self._other:
            facts["teacher"] = asdict(open_teacher(self.teacher).identity)
        if cached:
            after = cached.gap(job.model, self._of_kept(), self.beta)
            facts["teacher"] = cached.facts()
            facts["teacher_gap"] = {**cached.held_facts(), "before": before, "after": after}
        return settled(job, model, stored, "distill", self.trains).note("distill", **facts)

    def _live(self, job: Job) -> PreTrainedModel:
        """The teacher beside the model."""
        if not self._other:
            return frozen_teacher(job, self.teacher_dtype, self.teacher_device)
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(self.teacher_dtype, job.model.dtype)
        return read_teacher(self.teacher, dtype, torch.device("cpu") if self.teacher_device == "cpu" else job.device)

    def _asked(self, job: Job, total: int) -> CachedTeacher:
        """What the dense model says of the rows that will be seen, on disk."""
        question = Question(
            self.teacher_top,
            self.temperature,
            self.tokens,
            self.trains.micro_batch,
            self.chunk,
            self.teacher_dtype,
            self.teacher_device,
        )
        rows = rows_seen(job.batches(self.trains.batch, "distill"), total, len(job.rows))
        cached = CachedTeacher(job, job.same("distill", self), question, rows)
        cached.ask()
        return cached

    def _of_kept(self) -> Divergence:
        """The divergence from what is kept of a teacher."""
        assert self.divergence != "mse"  # refused
        return self.divergence

    def _from_kept(self, job: Job, model: nn.Module) -> CachedObjective:
        """The loss of the model that learns, from what is kept of the teacher."""
        return CachedObjective(
            model,
            job.task.halves(job.model, ()),
            compare=job.task.compare,
            divergence=self._of_kept(),
            temperature=self.temperature,
            beta=self.beta,
            hard_weight=self.hard_weight,
            tokens=self.tokens,
            chunk=self.chunk,
        )

    def _of_logits(self, job: Job, model: nn.Module, teacher: PreTrainedModel) -> DistillObjective:
        """The loss of the model that learns from another one."""
        seen = [row["picture"].inputs for row in job.rows[:1] if "picture" in row]  # both are models of pictures
        taught = Sees(job.task.halves(teacher, ()), seen[0], how_it_sees(self.teacher))
        return DistillObjective(
            model,
            job.task.halves(job.model, ()),
            taught,
            compare=job.task.compare,
            divergence=self.divergence,
            temperature=self.temperature,
            beta=self.beta,
            hard_weight=self.hard_weight,
            tokens=self.tokens,
            chunk=self.chunk,
        )

    def _objective(self, job: Job, model: nn.Module, teacher: PreTrainedModel) -> DistillObjective:
        """The loss of the model that learns, with the layers and hidden dimensions that it has left."""
        if self._other:
            return self._of_logits(job, model, teacher)
        ours, theirs = job.arch.blocks(job.model), job.arch.blocks(teacher)
        kept, dimensions = job.plan.kept.get("layers", range(len(theirs))), job.plan.kept.get("hidden")
        compared = bool(self.intermediate_weight)
        return DistillObjective(
            model,
            job.task.halves(job.model, list(ours) if compared else ()),
            job.task.halves(teacher, [theirs[i] for i in kept] if compared else ()),
            compare=job.task.compare,
            dimensions=None if dimensions is None else torch.tensor(dimensions),
            divergence=self.divergence,
            temperature=self.temperature,
            beta=self.beta,
            hard_weight=self.hard_weight,
            intermediate_weight=self.intermediate_weight,
            intermediate=self.intermediate,
            tokens=self.tokens,
            chunk=self.chunk,
        )


def _counted(teacher: str) -> Foreign:
    """What another teacher takes, by its shapes. Raises CheckpointError."""
    shaped = shaped_teacher(teacher)
    found = cost_of(arch_for(shaped.config), shaped, NONE)()
    return Foreign(int(found.total), int(found.macs) * tokens_of_picture(shaped.config))
