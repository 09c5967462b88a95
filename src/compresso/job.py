"""A job: what flows from stage to stage, and what a stage may do to it."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.arch.base import Arch
from compresso.arch.costs import cost_of
from compresso.arch.queries import WITHIN, axes_of
from compresso.arch.whole_layers import NAME as LAYERS
from compresso.arch.whole_layers import with_layers
from compresso.core.cost import CostModel
from compresso.core.measures import NONE, Measures
from compresso.core.plan import Plan
from compresso.core.row import Row
from compresso.data.cut_examples import Examples, cut_examples
from compresso.edit.patch import Patch
from compresso.edit.removal import Removal, remove_, without_tokens
from compresso.edit.token_ids import refuse_named
from compresso.observe.journal import FoldJournal
from compresso.observe.observe import Pass
from compresso.sweep.audit import Fingerprints, digest, fingerprints
from compresso.sweep.offload import Offloaded
from compresso.sweep.residence import InMemory, Residence
from compresso.sweep.swept import SweepRun
from compresso.tasks.base import Task
from compresso.tasks.causal_lm import CAUSAL_LM
from compresso.training.checkpoint import TrainingCheckpoints
from compresso.training.launch import is_main_process
from compresso.training.noise import mixed_seed
from compresso.training.order import ShuffledBatches
from compresso.training.progress import Progress
from compresso.training.ranks import Ranks, ranks
from compresso.training.rounds import RoundJournal

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """The state that stages hand on. Immutable but for `model`, which the last stage to touch it owns.

    Args:
        model: the live model, on its device.
        arch: its description.
        tokenizer: None for ready token windows.
        rows: training examples {"input_ids": list[int], "labels": list[int]}; empty where the recipe needs no data.
        held: a few examples that no stage trains on, for before/after losses.
        plan: everything removed so far, in terms of the original model.
        records: facts for records.json, by stage.
        identity: what a resume must agree on (recipe, model, data, versions).
        seed: of every random draw.
        out: where the running stage keeps training checkpoints; those found there are continued.
        pad_id: token that fills rows up; masked from attention and loss.
        quiet: no progress display.
        adapters: where stages that are asked to keep their adapter save it; None keeps none.
        patches: forward patches applied so far.
        original: reads the model that the run started from once more, in a dtype and on a device; it is the teacher of
            distillation. None where there is nothing to read it from.
        dense_held: the held-out examples in the dense model's tokens, once the vocabulary was cut; None while it is
            whole.
        offloaded: where the weights of a model larger than memory are; None where `model` holds them.
        task: what the run trains and judges by.
        labels: names of the classes, where the task has some.
        removal: what the last stage that removed units has removed so far.
        allow_dropped: whether a stage may drop more examples than a run may lose.
        measures: what a budget may be a share of beside counts of shapes.
    """

    model: PreTrainedModel
    arch: Arch
    tokenizer: PreTrainedTokenizerBase | None
    rows: Sequence[Row]
    held: Sequence[Row]
    plan: Plan
    records: Mapping[str, Any]
    identity: Mapping[str, Any]
    seed: int
    out: Path
    pad_id: int = 0
    quiet: bool = False
    adapters: Path | None = None
    patches: tuple[Patch, ...] = ()
    original: Callable[[torch.dtype, torch.device], PreTrainedModel] | None = None
    dense_held: Sequence[Row] | None = None
    offloaded: Offloaded | None = None
    task: Task = CAUSAL_LM
    labels: tuple[str, ...] = ()
    removal: Removal | None = None
    allow_dropped: bool = True
    measures: Measures = NONE

    @property
    def weights(self) -> Residence:
        """Where the model's weights are: their tensors, and how to call it."""
        return self.offloaded or InMemory(self.model)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.weights.device

    def note(self, stage: str, **facts: Any) -> "Job":
        """The same job with more facts about a stage in its records."""
        return replace(self, records={**self.records, stage: {**self.records.get(stage, {}), **facts}})

    def unseen(self) -> frozenset[int]:
        """Places among `rows` of those that the last stage which keeps some apart, and says so in its records, has not
        fitted weights to; none where no stage does. A stage that trained since has seen these as it has all others.
        """
        told = [facts["unseen"] for facts in self.records.values() if "unseen" in facts]
        return frozenset(told[-1]["places"]) if told and told[-1]["of"] == len(self.rows) else frozenset()

    def cost(self) -> CostModel:
        """Counts the model as it is now, under masks of query heads, too, and measures it as the run has budgets of.

        Raises:
            BudgetError: the table of its times does not hold for it.
        """
        return cost_of(self.arch, self.model, self.measures)

    def batches(self, batch: int, stage: str) -> ShuffledBatches:
        """Training batches of `batch` examples an update, in an order of the stage's own. Raises DataError without
        training data.
        """
        return ShuffledBatches(self.rows, batch, self.collated, mixed_seed(stage, self.seed), self.task.again)

    def collated(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Examples side by side: what the model reads, and labels."""
        return self.task.collate(rows, self.pad_id)

    def checkpoints(self) -> TrainingCheckpoints:
        """Where the running stage saves and resumes its training."""
        return TrainingCheckpoints(self.out, dict(self.identity))

    def same(self, stage: str, knobs: object, weights: Fingerprints | None = None) -> dict[str, Any]:
        """What a resume of a stage's work must agree on, as JSON: the run, the stage's knobs and the weights it got.

        weights: their fingerprints, where they are known; else they are taken.
        """
        return {
            "run": dict(self.identity),
            "stage": stage,
            "knobs": TypeAdapter(type(knobs)).dump_python(knobs, mode="json"),
            "weights": digest(weights or fingerprints(self.weights.tensors())),
        }

    def rounds(self, name: str, same: Mapping[str, Any]) -> RoundJournal:
        """The journal of one of the running stage's searches, by a name of its own; all processes search alike.

        same: from the method `same`, taken before the stage changes the model.
        """
        return RoundJournal(self.out / name, same, self.ranks)

    def observing(self, name: str, same: Mapping[str, Any]) -> Pass:
        """How one of the running stage's passes over data is shown, journalled and shared out; arguments as in
        `rounds`.
        """
        return Pass(FoldJournal(self.ranks.own(self.out / name), same), self.progress(), name, self.ranks)

    def sweeping(self, stage: str, knobs: object) -> SweepRun:
        """What a sweep of the running stage works on, for `compresso.sweep.swept`; knobs: the stage itself."""
        seed, same = mixed_seed(stage, self.seed), partial(self.same, stage, knobs)
        return SweepRun(
            stage, self.model, self.arch, self.rows, seed, self.out, same, self.offloaded, self.progress(), self.ranks
        )

    @property
    def ranks(self) -> Ranks:
        """The processes that were launched."""
        return ranks()

    def progress(self) -> Progress:
        """The display of a training loop; one process of several has it."""
        return Progress("silent" if self.quiet or not is_main_process() else "auto")

    def without(self, masks: Mapping[str, Tensor], stage: str, **facts: Any) -> "Job":
        """The job after removing the units whose mask is 0, with other mask values folded into the weights.

        The masked model is run beforehand and the smaller one afterwards on the same tokens, and how far their logits
        differ is recorded. A stage may remove several times: its records are of all of it, from the model that it was
        given to the one it leaves. If tokens leave, tokenizer, examples and teacher follow; see `with_tokens`.

        Raises:
            NumericError: if they differ by more than rounding explains.
        """
        if self.ranks.n > 1:  # near ties may fall otherwise in another process, and shapes must not
            masks = {name: self.ranks.agreed(one.detach().cpu()).to(one.device) for name, one in masks.items()}
        axes = axes_of(self.arch, self.model, WITHIN)
        axes = with_layers(axes, self.arch, self.model) if LAYERS in masks else axes
        plan = Plan.from_masks(axes, masks)
        tokens = plan.kept.get("vocab")
        job, told = (self, {}) if tokens is None else self.with_tokens(tokens)
        begun = self.removal
        if begun is None or begun.stage != stage:
            begun = Removal(stage, self.cost()().parameters(), {axis.name: axis.size for axis in axes})
        ids = list(self.held[0]["input_ids"][:128]) if self.held else []
        given = self.task.probe(self.held, self.pad_id) if self.held and tokens is None else None
        difference = remove_(self.model, axes, masks, ids, given, by=f"stage '{stage}'")
        removal = replace(begun, plan=begun.plan.then(plan), difference=max(begun.difference, difference))
        after = self.cost()().parameters()
        return replace(job, plan=self.plan.then(plan), removal=removal).note(
            stage, **removal.facts(after), **told, **facts
        )

    def with_tokens(self, kept: Sequence[int]) -> tuple["Job", dict[str, Any]]:
        """The job in the numbering of the tokens that stay, and what became of its examples; the model is not touched.

        The teacher loses the same rows of its embedding and head.

        Args:
            kept: ids, ascending, in the job's present numbering.

        Raises:
            CheckpointError: the tokenizer cannot be cut like this, or the model's config names a token that would
                leave.
            DataError: too many examples would be dropped; none is left to train on, or none that was held out.
        """
        config = self.model.config
        refuse_named(self.model, kept)
        given = Examples(self.tokenizer, self.rows, self.held, self.dense_held or self.held, self.pad_id)
        longest = getattr(config, "max_position_embeddings", None)
        cut = cut_examples(given, kept, int(config.vocab_size), longest, self.allow_dropped)
        if (n_dropped := len(self.rows) - len(cut.rows)) and not self.quiet:
            log.warning(
                "%d of %d training examples hold tokens that left and have no spelling: they are dropped",
                n_dropped,
                len(self.rows),
            )
        job = replace(
            self,
            tokenizer=cut.tokenizer,
            rows=cut.rows,
            held=cut.held,
            dense_held=cut.dense_held,
            pad_id=cut.pad_id,
            original=None if self.original is None else without_tokens(self.original, self.arch, kept),
        )
        return job, cut.facts
