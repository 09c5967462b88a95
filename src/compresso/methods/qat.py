"""Rounding of weights and activations to 4 or 8 bits while a model trains under its full teacher (Wu et al., arXiv
2301.12017; DeepSpeed's compression library).

Section 3, quantisation: each row of a weight has a scale, and so has each token's input of a linear, taken anew at
    every call; learned ranges are a moving average. Gradients pass through. See `compresso.core.quantisers`.
Section 3, training: one-stage distillation from the fine-tuned model, without labels: soft labels, attentions and
    hidden states of all layers, weighted equally. See `compresso.core.one_stage`.
Section 5, composition: fewer layers (`keep_layers` before it), then zeros, rows or heads by magnitude, then rounding.

There is no public configuration with 4-bit activations: the recipes take the library's for fewer bits (batch 32, clip
1, rate 5e-5 with warm-up and linear decay, float32) and say 4 bits. Guessed are their 3 epochs (18 there, of lower
bits) and which inputs have an asymmetric grid: those behind an activation without a gate, which are never far below 0.

Departures. Textbook grids by default, whose ends are levels; `quantisers: deepspeed_compat` has the library's. The mask
is multiplied in before rounding, Q(M * W), where the library has M * Q(W): scales are those of what is left. Masks are
by magnitude, once; learned scores are left out. Zeros that a weight came with stay. Soft labels are summed over the
classes; `soft_over: classes` divides by them, as the scripts do. Padding counts in no distance and in no learned range.
Attentions are probabilities, as transformers gives them, behind dropout. Embeddings keep their numbers unless asked.
Products of queries and keys, softmax and norms compute with full numbers, as in the paper's accuracy runs.

Files hold the rounded weights as full numbers. Rounding of activations is a forward patch that the records name and
`compresso.load` applies; with fewer than 8 bits no engine here has it: it is simulated.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
from torch import nn
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core.axis import Kind
from compresso.core.plan import Plan
from compresso.core.quantisers import FULL, Quantiser, Style
from compresso.core.squarehead import Norm
from compresso.edit.eager import EAGER, attention_of, eager
from compresso.edit.leaving import Leaving
from compresso.edit.precision import cast_
from compresso.edit.quantise_inputs import Asymmetric, inputs_of
from compresso.edit.quantised import QuantisedModel
from compresso.errors import RecipeError
from compresso.job import Job
from compresso.methods.qat_pairs import layer_pairs, paired
from compresso.stage import AdamW, Effects, Knobs, Learning, Passes, Trains, Watches, stage
from compresso.stage.tuning import frozen_teacher, group_of, learner, tune, watching
from compresso.sweep.compressed import Compressed, rounded_weights
from compresso.sweep.targets import Groups, Where, chosen, names_of
from compresso.training.history import History, curve
from compresso.training.one_stage_objective import OneStageObjective, Over, Taught, Weighs

log = logging.getLogger(__name__)
Share = Annotated[float, Gt(0), Le(1)]
Weight = Annotated[float, Ge(0)]


@stage(
    "qat",
    title="trains with rounded weights and activations under the full model",
    paper="2301.12017",
    effects=Effects.WEIGHTS | Effects.FORWARD,
    needs=("data", "gradients", "training"),
    when="Encoders at 4 bits, last of all stages; the dense model must fit beside it, at the task it is meant for.",
    failures=(
        "Decoders lose much at 4-bit activations, which the perplexity shows. Rounding of activations lives in"
        " compresso.load; below 8 bits it is simulated and nothing gets faster."
    ),
    any_task=True,
    zeroes={"weights_kept": 0.5, "weight_bits": 16, "input_bits": 16},
)
class Qat:
    """Knobs of training with roundings.

    Args:
        trains, adamw, watches: see `Trains`, `AdamW` and `Watches`; `steps: 0` rounds and trains nothing.
        weight_decay: of AdamW.
        weight_bits: 1 (binary), 2 (ternary) to 8; 16 rounds none.
        input_bits: of what the linears read, 3 to 8; 16 rounds none.
        quantisers: "textbook" or "deepspeed_compat".
        weight_scale: what shares a scale: a "row" or a "matrix", the public files' `quantize_groups: 1`.
        weight_symmetric: whether weights have a grid around 0.
        inputs: ranges, of a "token" or "learned".
        momentum: share of a learned range that a batch leaves.
        asymmetric: which inputs have a grid from their least to their greatest: "none", those behind an "activation"
            without a gate, or "all".
        embeddings: also round the rows of the token embedding.
        weights_kept, channels_kept, heads_kept: shares of each matrix, FFN and attention that stay.
        prune_at: updates before the others leave, at most half of all.
        logit_weight, attention_weight, hidden_weight, hard_weight: of soft labels, attentions, hidden states, labels.
        soft_over: "examples", or "classes" too.
        norm: what distances of hidden states are relative to; see `compresso.core.squarehead`.
        temperature: divides logits.
        tokens: where logits are compared, "labelled" or "all".
        chunk: tokens whose logits exist at a time.
        teacher_layers: the teacher's layers, from 0, that the student's learn from; None for those it has kept.
        teacher_dtype, teacher_device: as in `distill`.
        where: layers, modules and exceptions; see `compresso.sweep.targets.Where`.
    """

    trains: Annotated[Trains, Knobs(without=("save_adapter",))] = Trains(steps="3 epochs", batch=32, micro_batch=32)
    adamw: AdamW = AdamW(lr=5e-5, lr_schedule="linear", warmup=20)
    watches: Watches = Watches()
    weight_decay: Weight = 0.0
    weight_bits: Annotated[int, Ge(1), Le(16)] = 4
    input_bits: Annotated[int, Ge(3), Le(16)] = 4
    quantisers: Style = Style.TEXTBOOK
    weight_scale: Literal["row", "matrix"] = "row"
    weight_symmetric: bool = True
    inputs: Literal["token", "learned"] = "token"
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.95
    asymmetric: Asymmetric = "activation"
    embeddings: bool = False
    weights_kept: Share = 1.0
    channels_kept: Share = 1.0
    heads_kept: Share = 1.0
    prune_at: Annotated[int, Ge(0)] = 0
    logit_weight: Weight = 1.0
    attention_weight: Weight = 1.0
    hidden_weight: Weight = 1.0
    hard_weight: Weight = 0.0
    soft_over: Over = "examples"
    norm: Norm = "none"
    temperature: Annotated[float, Gt(0)] = 1.0
    tokens: Literal["labelled", "all"] = "labelled"
    chunk: Annotated[int, Ge(1)] = 512
    teacher_layers: tuple[Annotated[int, Ge(0)], ...] | None = None
    teacher_dtype: Literal["same", "bf16", "fp32"] = "same"
    teacher_device: Literal["same", "cpu"] = "same"
    where: Where = Where()

    def __post_init__(self) -> None:
        """Refuse grids that there are not, and a training without a loss or a teacher's layers. Raises ValueError."""
        self._weights()
        Quantiser(self.input_bits)
        if not (self._taught or self.hard_weight):
            raise ValueError("logit_weight, attention_weight, hidden_weight, hard_weight are all 0; give one of them")
        if self.teacher_layers == ():
            raise ValueError("teacher_layers=[] names none; give one for each of the student's layers, or leave it out")
        if self.inputs == "learned" and self.input_bits != FULL:
            if self.trains.checkpointing:
                raise ValueError("inputs=learned would see each batch twice under checkpointing=true; leave one out")
            if self.trains.steps == 0:
                raise ValueError("inputs=learned learns no range with steps=0; give inputs: token")

    @property
    def _taught(self) -> bool:
        return bool(self.logit_weight or self.attention_weight or self.hidden_weight)

    def learning(self) -> Learning:
        """All weights, under a teacher where something is compared with it."""
        return Learning(self.trains, [self.trains.steps], None, teacher=self._taught, chunk=self.chunk)

    def check(self, model: PreTrainedModel, arch: Arch) -> Groups:
        """The linears that are rounded; needs shapes only. Raises RecipeError or ArchError."""
        if self.embeddings:
            self._embedding(model)
        for share, kind in ((self.channels_kept, Kind.CHANNEL), (self.heads_kept, Kind.HEAD)):
            if share < 1 and not any(axis.kind == kind for axis in arch.axes(model)):
                raise RecipeError(f"{kind}s_kept={share}: this model has no {kind}s that can leave; set it to 1")
        return chosen(model, arch, self.where)

    def check_taught(self, layers: int, dense: int, removed: Plan) -> None:
        """Refuse the teacher's layers that it does not have, or that are not one for each of the student's, and
        attentions of which single query heads have left. Raises RecipeError.
        """
        if self.trains.steps != 0 and (self.attention_weight or self.hidden_weight or self.teacher_layers is not None):
            layer_pairs(layers, dense, removed.kept, self.teacher_layers, attentions=self.attention_weight > 0)

    def compressed(self, model: PreTrainedModel, arch: Arch) -> Compressed:
        """The weights it rounds, and the bits they take once packed."""
        found = rounded_weights(model, self.check(model, arch), self.weight_bits, 0, self.weight_symmetric)
        bits = None if self.weight_bits == FULL else found.bits
        return replace(found, bits=bits, sparsity=1 - self.weights_kept)

    def remarks(self, model: PreTrainedModel, arch: Arch) -> list[str]:
        """Another attention than the model's own."""
        own = attention_of(model)
        if not self.attention_weight or own == EAGER or self.trains.steps == 0:
            return []
        return [f"eager attention while it trains, since {own} shows no probabilities that could be compared"]

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """The passes of the training, and the teacher's."""
        return self.learning().passes()

    def __call__(self, job: Job) -> Job:
        """Put roundings on, train under the teacher, fold them into the weights, patch the inputs."""
        groups = self.check(job.model, job.arch)
        compressed, linears = self.compressed(job.model, job.arch), names_of(groups)
        inputs = inputs_of(self.input_bits, self.quantisers, self.asymmetric, linears, job.arch.axes(job.model))
        (total,) = self.trains.updates(len(job.rows))
        stored = job.model.eval().dtype
        model = learner(job, None)
        axes, leaving = job.arch.axes(job.model), self._leaving(linears)
        rounded = QuantisedModel(
            job.model,
            linears,
            self._weights(),
            inputs,
            self.momentum if self.inputs == "learned" and inputs.linears else None,
            [self._embedding(job.model)] if self.embeddings else [],
            self.weight_scale == "matrix",
            leaving.of(axes),
        )
        there = leaving.gone(rounded)
        if there and not job.quiet:
            log.warning("qat: %.1f %% of the weights that it rounds are 0 already and stay 0", 100 * there)
        prune_at = min(self.prune_at, total // 2)
        if not prune_at:
            leaving.prune_(rounded, axes)
        prune = partial(leaving.prune_, rounded, axes)
        facts = self._train(job, model, rounded, prune, total, prune_at) if total else {"updates": 0}
        gone, ranges = leaving.gone(rounded), rounded.ranges()
        rounded.fold_()
        job = replace(job, model=cast_(job.model, stored).requires_grad_(False).eval())  # pyright: ignore
        if inputs.linears:
            patch = inputs.patch(ranges)
            patch.apply_(job.model)
            job = replace(job, patches=(*job.patches, patch))
        return job.note(
            "qat",
            **facts,
            zeros=_zeros(job.model, linears),
            sparsity=gone or None,
            zero_before=there or None,
            bits=compressed.bits,
            activation_bits=None if self.input_bits == FULL else self.input_bits,
            activations_simulated=self.input_bits < 8,
            asymmetric_inputs=len(inputs.asymmetric),
            linears=len(linears),
        )

    def _train(
        self,
        job: Job,
        model: nn.Module,
        rounded: QuantisedModel,
        prune_: Callable[[], None],
        total: int,
        prune_at: int,
    ) -> dict[str, object]:
        """Train the full weights; what is to be told of it."""
        if (told := self.remarks(job.model, job.arch)) and not job.quiet:
            log.warning("qat: %s", "; ".join(told))
        teacher = self._teacher(job)
        learning = group_of("all", model, self.adamw, job.model.config.hidden_size, total, self.weight_decay)
        watch = watching(job, self.watches, total)

        def prune(update: int) -> Mapping[str, float] | None:
            if update + 1 >= prune_at and not rounded.pruned:
                prune_()
            return None

        models = [job.model] if teacher is None else [job.model, teacher]
        attention = attention_of(job.model)
        with eager(*models) if self.attention_weight else nullcontext():
            objective = self._objective(job, model, teacher, rounded)
            history: History = tune(
                job,
                "qat",
                self.trains,
                objective,
                [learning],
                total,
                after_update=prune if prune_at else None,
                watch=watch,
            )
        return {
            "updates": total,
            "trainable": learning.numbers,
            "lr": learning.lr,
            "attention": f"{EAGER}, {attention} otherwise" if told else attention,
            "pruned_at": prune_at,
            "curve": curve(history),
            **(watch.facts() if watch else {}),
        }

    def _teacher(self, job: Job) -> PreTrainedModel | None:
        """The dense model, if something is compared with it."""
        if not self._taught:
            return None
        cure = "set Job.original, or logit_weight: 0, attention_weight: 0, hidden_weight: 0 and hard_weight: 1"
        return frozen_teacher(job, self.teacher_dtype, self.teacher_device, cure)

    def _objective(
        self, job: Job, model: nn.Module, teacher: PreTrainedModel | None, rounded: QuantisedModel
    ) -> OneStageObjective:
        """The loss, with the layers, heads and hidden dimensions that are left."""
        weighs = Weighs(
            self.logit_weight,
            self.attention_weight,
            self.hidden_weight,
            self.hard_weight,
            self.soft_over,
            self.norm,
            self.temperature,
            self.tokens,
            self.chunk,
        )
        student = job.task.halves(job.model, ())
        taught = Taught(student, None)
        if teacher is not None:
            taught = Taught(student, job.task.halves(teacher, ()))
        if teacher is not None and (self.attention_weight or self.hidden_weight):
            taught = paired(job, taught, teacher, self.teacher_layers, attentions=self.attention_weight > 0)
        reading = rounded.reading if self.inputs == "learned" else ()
        return OneStageObjective(model, taught, weighs, job.task.compare, reading)

    def _leaving(self, linears: Sequence[str]) -> Leaving:
        """What pruning takes of the model."""
        return Leaving(linears, self.weights_kept, self.channels_kept, self.heads_kept)

    def _weights(self) -> Quantiser:
        """Of rows of weights. Raises ValueError for a grid that there is not."""
        return Quantiser(self.weight_bits, self.weight_symmetric, self.quantisers)

    def _embedding(self, model: PreTrainedModel) -> str:
        """The token embedding's name. Raises RecipeError if the head has the same weight."""
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if head is not None and head.weight is embedding.weight:
            raise RecipeError("embeddings=true, and the head shares their weight, which stays full; set it to false")
        return next(name for name, module in model.named_modules() if module is embedding)


def _zeros(model: nn.Module, linears: Sequence[str]) -> dict[str, str]:
    """Weight -> "zeros/entries", of rounding and pruning together."""
    found = {f"{name}.weight": model.get_parameter(f"{name}.weight") for name in sorted(linears)}
    return {name: f"{int((weight == 0).sum())}/{weight.numel()}" for name, weight in found.items()}
