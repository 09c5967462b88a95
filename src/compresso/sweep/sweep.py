"""One pass over a model, block after block, each calibrated on the outputs of the already edited blocks before it.

The loop of SparseGPT, Wanda and GPTQ: look at the inputs of a block's linears while it is still as it was, edit them,
run the block again for the inputs of the next. Linears that read the same input share one statistic. With
`true_sequential` a block is looked at again after each group of linears, so that those behind see the edited ones
before them. Blocks behind the last edited one are not run.

An edit of a `BlockEdit` visits each block as a whole instead, with gradients on; see `compresso.sweep.block`.

Calibration rows of equal length run together, so nothing is padded and statistics hold real tokens only. What else a
block is called with is recorded in one pass before the first block; see `compresso.sweep.calls`.

Several processes run a share of the batches each (`compresso.training.ranks`), and merge what they saw before an edit
is given it: it changes weights by the statistics of all, in every process alike. The main one's weights are then taken
by all, and it writes the journal, which any number of processes can go on from.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.errors import RecipeError, ResourceError
from compresso.observe.folds import Fold, across_of
from compresso.sweep.activation_store import ActivationStore, Place
from compresso.sweep.block import BlockEdit, BlockRunner
from compresso.sweep.calls import recorded_calls
from compresso.sweep.finite import check_weights
from compresso.sweep.journal import Journal
from compresso.sweep.offload import Offloaded
from compresso.sweep.targets import Groups, edited_names
from compresso.sweep.visitors import BlockVisitor, Edit, GroupVisitor, Visitor
from compresso.training.progress import Progress
from compresso.training.ranks import ALONE, Ranks
from compresso.training.signals import noted_signals


@torch.no_grad()
def sweep(
    model: PreTrainedModel,
    arch: Arch,
    groups: Groups,
    batches: Sequence[Tensor],
    fold: Fold | None,
    edit: Edit | BlockEdit,
    *,
    place: Place = "device",
    scratch: Path = Path("activations"),
    true_sequential: bool = False,
    collect_only: bool = False,
    rescales: bool = False,
    journal: Journal | None = None,
    offloaded: Offloaded | None = None,
    progress: Progress | None = None,
    name: str = "sweep",
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Look at each group of linears and edit it, block after block.

    Args:
        model: edited in place.
        arch: knows its blocks.
        groups: the linears to work on.
        batches: ids [rows, seq] each, of rows that need no padding.
        fold, edit: see `Fold`, whose rows are inputs of tokens [tokens, in], float32, `Edit` and `BlockEdit`. A
            `BlockEdit` may do without statistics: its `fold` may be None.
        place, scratch: where the states between two blocks are kept, and the folder for "disk".
        true_sequential: look again after each group.
        collect_only: `edit` changes nothing, so that no block is run twice.
        rescales: `edit` changes what feeds a group, too.
        journal: of finished blocks, which are read instead of done; None keeps none.
        offloaded: where weights of a model on the meta device come from, block by block; the journal holds the edited
            ones.
        progress, name: display.
        ranks: the processes that sweep together; each is given all batches, and runs its share.

    Returns:
        What `edit` noted, by full name.

    Raises:
        NumericError: NaN or Inf in a weight or in what a linear reads, or a linear that no token reached.
        ArchError: linears of a group do not read the same input.
        RecipeError: `true_sequential` for an edit that visits whole blocks.
        ResourceError: several processes for a statistic or an edit that one has to make alone.
        Interrupted: SIGINT or SIGTERM came and the journal has what is done.
    """
    if isinstance(edit, BlockEdit) and true_sequential:
        raise RecipeError(f"{name} edits a block as a whole, not its groups one by one; set true_sequential to false")
    _refuse_apart(ranks, fold, edit, name)
    if offloaded is None:
        check_weights(model, groups)
    blocks, last = arch.blocks(model), max(groups)
    done = journal.agreed(list(groups), ranks) if journal else set[int]()
    scratch = ranks.own(scratch)
    states = ActivationStore(place, offloaded.device if offloaded else model.device, scratch)
    visitor: Visitor
    if isinstance(edit, BlockEdit):
        dense = ActivationStore(place, states.device, scratch / "dense")
        visitor = BlockVisitor(model, fold, edit, min(groups), dense, groups=groups, ranks=ranks)
    else:
        assert fold is not None, "an edit of groups needs a statistic"
        visitor = GroupVisitor(model, fold, edit, true_sequential, collect_only, ranks)
    notes: dict[str, Any] = {}
    model.eval()
    shown = progress or Progress("silent")
    tokens, batches = float(sum(batch.numel() for batch in batches)), ranks.mine(batches)
    try:
        with ranks.failing_alike(), offloaded.loaded(offloaded.around(blocks)) if offloaded else nullcontext():
            calls = recorded_calls(model, blocks, batches, states)
        with noted_signals() as requests, shown.running(last + 1, 0, name):
            for layer, block in enumerate(blocks[: last + 1]):
                runner = BlockRunner(block, layer, [of_batch[layer] for of_batch in calls], states)
                here = groups.get(layer, ())
                with offloaded.loaded(offloaded.of_block(block)) if offloaded else nullcontext():
                    visitor.pass_dense(runner)
                    if journal and layer in done:
                        weights, facts = journal.read(layer)
                        for parameter, weight in weights.items():
                            model.get_parameter(parameter).copy_(weight)
                    else:
                        facts = ranks.agreed(visitor.visit(here, runner) if here else {})
                        named = {one: model.get_parameter(one) for one in edited_names(model, here, rescales)}
                        ranks.copied_(named.values())
                        with ranks.failing_alike():
                            if journal and here and ranks.is_main:
                                journal.write(layer, named, facts)
                    notes |= facts
                    if offloaded and journal and here:
                        offloaded.store.replace(journal.weights(layer))
                    if layer < last and not (here and visitor.keeps_states):
                        with ranks.failing_alike():
                            runner.run(keep=True)
                shown.step(layer + 1, name, {}, tokens)
                ranks.obey(requests, str(journal.folder) if journal and journal.folder.is_dir() else None)
    finally:
        states.discard()
        visitor.discard()
    return notes


def _refuse_apart(ranks: Ranks, fold: Fold | None, edit: Edit | BlockEdit, name: str) -> None:
    """Raise ResourceError for work of several processes that one has to do alone."""
    if ranks.n == 1:
        return
    if isinstance(edit, BlockEdit) and edit.reads_batches:
        raise ResourceError(
            f"stage '{name}' learns block by block in one process, and {ranks.n} were launched; start it without"
            " torchrun"
        )
    if fold is not None and across_of(fold) is None:
        raise ResourceError(
            f"stage '{name}' takes a statistic that does not add up over processes, and {ranks.n} were launched; start"
            " it without torchrun"
        )
