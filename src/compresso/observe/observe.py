"""One pass over data that changes nothing: statistics are folded over what a model shows at some sites.

The loop behind every score and every mean of this program, but for those of a sweep, whose blocks are edited while it
looks (it shares the folds). It knows padding, moves batches to the device, shows how far it is, and can be stopped and
continued with the same numbers: the same batches are folded in the same order. Several processes read a share of the
batches each, and have the statistics of all.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from compresso.core.row import tokens_in
from compresso.errors import ResumeError
from compresso.observe.folds import Fold, Stats, across_of, merge_
from compresso.observe.journal import FoldJournal, State
from compresso.observe.overflow import watched
from compresso.observe.sites import Positions, See, Site
from compresso.training.progress import Progress
from compresso.training.ranks import ALONE, Ranks
from compresso.training.signals import noted_signals

Batch = Mapping[str, Tensor]
"""input_ids and attention_mask, each int64 [batch, seq], or pixel_values [batch, channels, height, width], and whatever
else the run of a pass needs.
"""

Run = Callable[[PreTrainedModel, Batch, See], None]
"""Runs a model on a batch, which is on its device; what no hook can show it may give to `See` itself."""


@dataclass(frozen=True)
class Pass:
    """How a pass is shown, kept and shared out.

    Args:
        journal: of its state in this process; None keeps none.
        progress, name: display.
        ranks: the processes that make this pass together. Where a fold does not say how shares of it are put together
            (`compresso.observe.folds.across`), each of them reads all batches.
    """

    journal: FoldJournal | None = None
    progress: Progress | None = None
    name: str = "observe"
    ranks: Ranks = ALONE


def body(model: PreTrainedModel, batch: Batch, see: See) -> None:
    """Run: one forward pass without the head."""
    model.base_model(**_inputs(batch), use_cache=False)


def whole(model: PreTrainedModel, batch: Batch, see: See) -> None:
    """Run: one forward pass."""
    model(**_inputs(batch), use_cache=False)


def _inputs(batch: Batch) -> dict[str, Tensor]:
    """What a model reads of a batch: tokens with their mask, or pictures."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values") if name in batch}


@torch.no_grad()
def observe(
    model: PreTrainedModel,
    sites: Sequence[Site],
    fold: Fold | Mapping[str, Fold],
    batches: Iterable[Batch],
    *,
    run: Run = body,
    how: Pass | None = None,
) -> dict[str, Stats]:
    """The statistics of what a model shows at some sites, by the names that the sites give them; those that showed
    nothing are absent.

    Args:
        model: run in evaluation mode, without gradients unless `run` turns them on.
        sites: where to look; see `compresso.observe.sites`.
        fold: the statistic, or one by name.
        batches: on any device. Where progress is shown they are read into a list first.
        run: what is done with a batch; a backward pass, too, for sites that show gradients.
        how: display, journal and processes; None for none of them.

    Raises:
        NumericError: a layer outputs NaN or Inf, which is named.
        ResumeError: the journal is of other batches or of another pass.
        Interrupted: SIGINT or SIGTERM came; the journal has what is done.

    Example:
        stats = observe(model, [calls({"down": linear}, inputs)], squares, batches)["down"]
        root_mean_square = (stats.total / stats.n).sqrt()
    """
    how = how or Pass()
    journal, shown = how.journal, how.progress or Progress("silent")
    folds = list(fold.values()) if isinstance(fold, Mapping) else [fold]
    ranks = how.ranks if all(across_of(one) for one in folds) else ALONE
    if how.progress is not None and not isinstance(batches, Sized):
        batches = list(batches)
    with ranks.failing_alike():
        saved = None if journal is None else journal.latest()
    done, found = (0, {}) if saved is None else (saved.n_batches, dict(saved.stats))
    data, positions, n = hashlib.sha256(), Positions(), 0

    def see(name: str, rows: Tensor) -> None:
        one = fold[name] if isinstance(fold, Mapping) else fold
        so_far = found.get(name)
        total = one(None if so_far is None else so_far.total, rows.detach())
        found[name] = Stats(total, len(rows) + (0 if so_far is None else so_far.n))

    def keep(n_batches: int) -> None:
        assert journal is not None
        journal.write(State(n_batches, data.hexdigest(), found))

    model.eval()
    handles: list[RemovableHandle] = []
    try:
        for site in sites:
            handles += site(see, positions)
        handles += watched(model, positions)
        steps = len(batches) if isinstance(batches, Sized) else 0
        with (
            ranks.failing_alike(),
            noted_signals() if journal else nullcontext() as requests,
            shown.running(steps, done, how.name),
        ):
            for n, batch in enumerate(batches, start=1):
                if journal is not None:
                    _add_to(data, batch)
                if n < done:
                    continue
                if saved is not None and n == done:
                    _check_same(saved, data.hexdigest(), journal)
                    continue
                if (n - 1) % ranks.n == ranks.rank:
                    here = {name: value.to(model.device) for name, value in batch.items()}
                    positions.set(here)
                    run(model, here, see)
                    shown.step(n, how.name, {}, tokens_in(batch))
                if journal is not None and requests is not None:
                    if n % journal.every == 0 or requests.arrived:
                        keep(n)
                    requests.obey(str(journal.folder))
            if saved is not None and n < done:
                _check_same(saved, "", journal)
            if journal is not None and n > done and n % journal.every:
                keep(n)
        merge_(found, fold, ranks)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _add_to(data: "hashlib._Hash", batch: Batch) -> None:
    """Take a batch into the hash of what was seen."""
    for name, value in sorted(batch.items()):
        data.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        data.update(value.cpu().contiguous().view(torch.uint8).numpy().tobytes())


def _check_same(saved: State, data: str, journal: FoldJournal | None) -> None:
    """Raise ResumeError unless the saved statistics are of these batches."""
    if data != saved.data:
        assert journal is not None
        raise ResumeError(
            f"{journal.folder} is of {saved.n_batches} other batches; restore these, or start afresh in another output"
            " folder"
        )
