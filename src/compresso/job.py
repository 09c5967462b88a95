"""A job: what flows from stage to stage, and what a stage may do to it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from pydantic import TypeAdapter
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.arch.base import Arch
from compresso.arch.outputs import outputs
from compresso.core.cost import CostModel
from compresso.core.plan import Plan
from compresso.data.batches import Row, pad_id
from compresso.data.cut_tokenizer import cut, translation
from compresso.edit.gate import gated
from compresso.edit.lora import save_adapter
from compresso.edit.patch import Patch
from compresso.edit.shrink import shrink_
from compresso.edit.token_ids import token_ids
from compresso.errors import CheckpointError, DataError, NumericError, ResourceError
from compresso.observe.folds import Fold
from compresso.observe.journal import FoldJournal
from compresso.observe.observe import Pass
from compresso.sweep.audit import Fingerprints, audit, digest, fingerprints
from compresso.sweep.block import BlockEdit
from compresso.sweep.calibration import Calibration
from compresso.sweep.journal import Journal
from compresso.sweep.offload import Offloaded
from compresso.sweep.sweep import sweep
from compresso.sweep.targets import Groups, edited_names, names_of
from compresso.sweep.visitors import Edit
from compresso.tasks.base import Task
from compresso.tasks.causal_lm import CAUSAL_LM
from compresso.training.checkpoint import TrainingCheckpoints
from compresso.training.history import History
from compresso.training.launch import processes
from compresso.training.noise import mixed_seed
from compresso.training.order import ShuffledBatches
from compresso.training.progress import Progress
from compresso.training.rounds import RoundJournal


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

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.offloaded.device if self.offloaded else self.model.device

    def tensors(self) -> Mapping[str, Tensor]:
        """The model's tensors by name; those of an offloaded model are read when they are asked for."""
        return self.offloaded.store if self.offloaded else self.model.state_dict()

    def callable_model(self) -> AbstractContextManager[None]:
        """Within the context the model can be called, also one whose weights are on disk."""
        return self.offloaded.whole() if self.offloaded else nullcontext()

    def note(self, stage: str, **facts: Any) -> "Job":
        """The same job with more facts about a stage in its records."""
        return replace(self, records={**self.records, stage: {**self.records.get(stage, {}), **facts}})

    def cost(self) -> CostModel:
        """Counts the model as it is now."""
        return CostModel(self.arch.axes(self.model), self.arch.weights(self.model))

    def batches(self, batch: int, stage: str) -> ShuffledBatches:
        """Training batches of `batch` examples an update, in an order of the stage's own. Raises DataError without
        training data.
        """
        return ShuffledBatches(self.rows, batch, self.collated, mixed_seed(stage, self.seed))

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
            "weights": digest(weights or fingerprints(self.tensors())),
        }

    def rounds(self, name: str, same: Mapping[str, Any]) -> RoundJournal | None:
        """The journal of one of the running stage's searches, by a name of its own; several processes keep none.

        same: from the method `same`, taken before the stage changes the model.
        """
        return RoundJournal(self.out / name, same) if processes() == 1 else None

    def observing(self, name: str, same: Mapping[str, Any]) -> Pass:
        """How one of the running stage's passes over data is shown and journalled; arguments as in `rounds`."""
        return Pass(FoldJournal(self.out / name, same) if processes() == 1 else None, self.progress(), name)

    def keep_adapter(self, adapted: PeftModel, stage: str) -> None:
        """Save a stage's adapter before it is merged, in the folder `adapters` of the result."""
        if self.adapters is not None and PartialState().is_main_process:
            save_adapter(adapted, self.adapters / stage)

    def progress(self) -> Progress:
        """The display of a training loop."""
        return Progress("silent" if self.quiet else "auto")

    def without(self, masks: Mapping[str, Tensor], stage: str, **facts: Any) -> "Job":
        """The job after removing the units whose mask is 0, with other mask values folded into the weights.

        The masked model is run beforehand and the smaller one afterwards on the same tokens; how far their logits
        differ is recorded.

        If tokens leave, tokenizer, examples and teacher follow, and the comparison is over what stays; see
        `with_tokens`.

        Raises:
            NumericError: if they differ by more than rounding explains: the shape surgery would be wrong.
        """
        axes = self.arch.axes(self.model)
        plan = Plan.from_masks(axes, masks)
        tokens = plan.kept.get("vocab")
        job, told = (self, {}) if tokens is None else self.with_tokens(tokens)
        ids = (
            list(self.held[0]["input_ids"][:128])
            if self.held
            else list(range(min(64, getattr(self.model.config, "vocab_size", 0))))
        )
        given = self.task.probe(self.held, self.pad_id) if self.held and tokens is None else None
        places = {i: i for i in ids} if tokens is None else {old: new for new, old in enumerate(tokens)}
        ids = [i for i in ids if i in places] or list(places)[:64]
        dense = self.cost()
        before = dense().parameters()
        with gated(self.model, axes, {name: mask.to(self.device) for name, mask in masks.items()}):
            masked = self._probe(ids, given)
        masked = masked if tokens is None else masked[..., list(tokens)]
        soft = {name: mask for name, mask in masks.items() if bool(((mask != 0) & (mask != 1)).any())}
        shrink_(self.model, axes, plan, soft)
        difference = float((self._probe([places[i] for i in ids], given) - masked).abs().max())
        allowed = 1e3 * torch.finfo(self.model.dtype).eps * float(masked.abs().max().clamp(min=1))
        if not difference <= allowed:
            raise NumericError(
                f"stage '{stage}': the smaller model's logits differ from the masked model's by {difference:.3g}, more"
                f" than {allowed:.3g}"
            )
        after = self.cost()().parameters()
        kept = {
            name: f"{len(units)}/{next(a.size for a in axes if a.name == name)}" for name, units in plan.kept.items()
        }
        return replace(job, plan=self.plan.then(plan)).note(
            stage,
            parameters_before=before,
            parameters_after=after,
            kept_share_of_blocks=after["blocks"] / before["blocks"],
            units_kept=kept,
            masked_minus_smaller_max_abs=difference,
            **told,
            **facts,
        )

    def swept(
        self,
        stage: str,
        knobs: Any,
        groups: Groups,
        calibration: Calibration,
        fold: Fold | None,
        edit: Edit | BlockEdit,
        rescales: bool = False,
    ) -> tuple["Job", dict[str, Any]]:
        """The job after a sweep over the blocks that edits the weights of some linears, journalled; and what the edits
        noted, by linear.

        What changed, and what did not although it was meant to, goes into the records.

        Args:
            stage: its name.
            knobs: the stage itself: a resume must agree on them.
            groups: the linears.
            calibration: which rows, and how they run.
            fold, edit, rescales: see `compresso.sweep.sweep`.

        Raises as `sweep` and `audit`; ResumeError if the journal is another run's, ResourceError in several processes.
        """
        if processes() > 1:
            raise ResourceError(
                f"stage '{stage}' sweeps in one process, and {processes()} were launched; start it without torchrun"
            )
        before, seed = fingerprints(self.tensors()), mixed_seed(stage, self.seed)
        batches = calibration.batches(self.rows, seed)
        journal = Journal(
            self.out, self.same(stage, knobs, before) | {"calibration": digest([batch.tolist() for batch in batches])}
        )
        notes = sweep(
            self.model,
            self.arch,
            groups,
            batches,
            fold,
            edit,
            place=calibration.activations,
            scratch=self.out / "activations",
            true_sequential=calibration.true_sequential,
            rescales=rescales,
            journal=journal,
            offloaded=self.offloaded,
            progress=self.progress(),
            name=stage,
        )
        feeding = edited_names(self.model, [group for here in groups.values() for group in here], rescales)
        facts = audit(self.tensors(), before, names_of(groups), feeding)
        read = {
            "calibration_examples": sum(map(len, batches)),
            "calibration_tokens": sum(batch.numel() for batch in batches),
        }
        return self.note(stage, **facts, **read), notes

    def with_tokens(self, kept: Sequence[int]) -> tuple["Job", dict[str, Any]]:
        """The job in the numbering of the tokens that stay, and what became of its examples; the model is not touched.

        A token that left is spelled with what stays, as the smaller tokenizer would; an example with one that cannot be
        spelled (there is no tokenizer, or only an unknown token is left) is dropped and counted. The teacher loses the
        same rows of its embedding and head.

        Args:
            kept: ids, ascending, in the job's present numbering.

        Raises:
            CheckpointError: the tokenizer cannot be cut like this, or the model's config names a token that would
                leave.
            DataError: no example is left to train on, or none that was held out.
        """
        config, staying = self.model.config, set(kept)
        size = int(config.vocab_size)
        if lost := sorted(i for i in token_ids(self.model) - staying if 0 <= i < size):
            raise CheckpointError(
                f"the model's config gives the tokens {lost} a meaning, so they may not leave; keep them"
            )
        tokenizer = None if self.tokenizer is None else cut(self.tokenizer, kept, size)
        to, context = translation(self.tokenizer, tokenizer, kept), getattr(config, "max_position_embeddings", None)
        rows, n_rows_spelled = to.rows(self.rows, context)
        held, n_held_spelled = to.rows(self.held, context)
        pairs = [pair for pair in zip(held, self.dense_held or self.held, strict=True) if pair[0] is not None]
        trained = [row for row in rows if row is not None]
        for what, before, left in (("training", rows, trained), ("held-out", held, pairs)):
            if before and not left:
                raise DataError(
                    f"all {len(before)} {what} examples hold tokens that left and have no spelling; keep more, or give"
                    " more text"
                )
        original, arch = self.original, self.arch

        def teacher(dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
            """The original model without the same tokens."""
            assert original is not None  # used below only where there is one
            model = original(dtype, device)
            shrink_(model, arch.axes(model), Plan({"vocab": tuple(kept)}))
            return model

        job = replace(
            self,
            tokenizer=tokenizer,
            rows=trained,
            held=[new for new, _ in pairs if new is not None],
            dense_held=[old for _, old in pairs],
            pad_id=(
                pad_id(tokenizer)
                if tokenizer is not None
                else list(kept).index(self.pad_id)
                if self.pad_id in staying
                else 0
            ),
            original=None if original is None else teacher,
        )
        facts = {
            "tokens": [len(kept), size],
            "examples_spelled_anew": {"training": n_rows_spelled, "held": n_held_spelled},
            "examples_dropped": {"training": len(rows) - len(trained), "held": len(held) - len(pairs)},
        }
        return job, facts

    def _probe(self, ids: Sequence[int], given: Mapping[str, Tensor] | None) -> Tensor:
        """What the model computes, float32, on examples of its task, on these tokens, or on one image of noise."""
        self.model.eval()
        if given is not None:
            return outputs(self.model, {name: value.to(self.device) for name, value in given.items()})
        config = self.model.config
        if self.model.main_input_name == "pixel_values":
            shape = (1, config.num_channels, config.image_size, config.image_size)
            return outputs(self.model, torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device))
        return outputs(self.model, torch.tensor([list(ids)], device=self.device))


def check_finite(model: PreTrainedModel, stage: str) -> None:
    """Refuse a model with NaN or Inf in a weight. Raises NumericError naming the stage and the tensor."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise NumericError(
                f"stage '{stage}' left NaN or Inf in {name}; nothing was written. Lower its learning rate"
            )


def curve(history: History, points: int = 200) -> dict[str, list[float | None]]:
    """A training log thinned to at most `points` rows a column, for records and plots; "update" is the horizontal axis.

    None where a phase did not log a column.
    """
    step = max(1, -(-len(history.rows) // points))
    rows = history.rows[::step]
    names = sorted({name for row in history.rows for name in row})
    return {name: [round(float(row[name]), 6) if name in row else None for row in rows] for name in names}
