"""A sweep as a stage of a run does it: on the run's examples, journalled, so that a killed run goes on, and audited."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.core.row import Row
from compresso.observe.folds import Fold
from compresso.sweep.audit import Fingerprints, audit, digest, fingerprints
from compresso.sweep.block import BlockEdit
from compresso.sweep.calibration import Calibration
from compresso.sweep.journal import Journal
from compresso.sweep.offload import Offloaded
from compresso.sweep.residence import InMemory
from compresso.sweep.sweep import sweep
from compresso.sweep.targets import Groups, edited_names, names_of
from compresso.sweep.visitors import Edit
from compresso.training.progress import Progress
from compresso.training.ranks import ALONE, Ranks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepRun:
    """What a run gives to a stage's sweep; `Job.sweeping` makes it.

    Args:
        stage: its name.
        model, arch: swept in place.
        rows: examples to calibrate on.
        seed: of their choice.
        folder: where the journal lies, and states between two blocks that are kept on disk.
        same: weights' fingerprints -> what a resume must agree on.
        offloaded: where the weights are, if not in memory.
        progress: display.
        ranks: the processes that sweep together.
    """

    stage: str
    model: PreTrainedModel
    arch: Arch
    rows: Sequence[Row]
    seed: int
    folder: Path
    same: Callable[[Fingerprints], Mapping[str, Any]]
    offloaded: Offloaded | None = None
    progress: Progress | None = None
    ranks: Ranks = ALONE


def swept(
    run: SweepRun,
    groups: Groups,
    calibration: Calibration,
    fold: Fold | None,
    edit: Edit | BlockEdit,
    rescales: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sweep over the blocks and edit the weights of some linears.

    Args:
        run: the run's part.
        groups: the linears.
        calibration: which rows, and how they run.
        fold, edit, rescales: see `compresso.sweep.sweep`.

    Returns:
        Facts for the records (what changed, and what did not although it was meant to; examples and tokens; of experts
        how many tokens they read, and which read none, which is said aloud), and what the edits noted, by linear.

    Raises:
        ResumeError: the journal is another run's.
        CompressoError: as `sweep` and `audit`.
    """
    weights = run.offloaded or InMemory(run.model)
    before, batches = fingerprints(weights.tensors()), calibration.batches(run.rows, run.seed)
    run.ranks.warn_of_idle(run.stage, len(batches))
    journal = Journal(run.folder, {**run.same(before), "calibration": digest([batch.tolist() for batch in batches])})
    notes = sweep(
        run.model,
        run.arch,
        groups,
        batches,
        fold,
        edit,
        place=calibration.activations,
        scratch=run.folder / "activations",
        true_sequential=calibration.true_sequential,
        rescales=rescales,
        journal=journal,
        offloaded=run.offloaded,
        progress=run.progress,
        name=run.stage,
        ranks=run.ranks,
    )
    read_by_experts = _of_experts(notes)
    if (starved := read_by_experts.get("starved")) and run.ranks.is_main:
        where, which = next(iter(starved.items()))
        log.warning(
            "%s: no calibration token chose some experts (%d), the first is %d of %s. All their inputs count alike,"
            " which prunes by size and rounds to the nearest; give more examples, or let drop_experts take them out",
            run.stage,
            sum(map(len, starved.values())),
            which[0],
            where,
        )
    feeding = edited_names(run.model, [group for here in groups.values() for group in here], rescales)
    read: dict[str, Any] = {
        "calibration_examples": sum(map(len, batches)),
        "calibration_tokens": sum(batch.numel() for batch in batches),
    }
    if read_by_experts:
        read["expert_tokens"] = read_by_experts
    return audit(weights.tensors(), before, names_of(groups), feeding) | read, notes


def _of_experts(notes: Mapping[str, Any]) -> dict[str, Any]:
    """How many tokens experts read, and which read none, by their module; empty without experts."""
    tokens: dict[str, dict[int, int]] = {}
    for name, facts in notes.items():
        if "tokens" in facts:
            stack, _, number = name.rpartition(".")
            tokens.setdefault(stack.rpartition(".")[0], {})[int(number)] = facts["tokens"]
    counts = sorted(n for of in tokens.values() for n in of.values())
    if not counts:
        return {}
    starved = {where: sorted(number for number, n in of.items() if not n) for where, of in tokens.items()}
    return {
        "least": counts[0],
        "median": counts[len(counts) // 2],
        "most": counts[-1],
        "starved": {where: numbers for where, numbers in starved.items() if numbers},
    }
