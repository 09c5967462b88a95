"""How many weights each layer loses, found by search: non-uniform sparsity of a total that stays what it was.

Each layer is pruned at several shares around the one asked for, all on the dense model's statistics, and what that
leaves is kept on disk. A candidate is a share of each layer, put together from there. Candidates are compared by their
divergence from the dense model (EvoPress, arXiv 2410.14649). The stage then prunes once more at the shares
that were found, each layer on what the pruned layers before it give out.

The total of zeros is never below the uniform one, and equal to it where the grid has whole counts
(`compresso.sweep.shares`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compresso.errors import RecipeError, ResourceError
from compresso.observe.folds import Fold, Stats
from compresso.solve.evolve import Fitness
from compresso.solve.level_choice import Item, Levels
from compresso.solve.search import Search, recorded, search_levels, with_errors
from compresso.sweep.audit import digest, fingerprints
from compresso.sweep.calibration import Calibration
from compresso.sweep.candidates import candidate_divergence
from compresso.sweep.level_store import LevelStore
from compresso.sweep.shares import Compared, ShareAllocation, ShareSearch, share_grid, zeros_at
from compresso.sweep.sweep import sweep
from compresso.sweep.swept import SweepRun
from compresso.sweep.targets import Group, Groups, matrix, weight_of
from compresso.sweep.visitors import Edit
from compresso.training.fitness_journal import journalled
from compresso.training.noise import mixed_seed
from compresso.training.rounds import RoundJournal

NOTHING_SEEN = Stats(torch.empty(0), 0)
"""What an edit is given that wants no statistic."""


@dataclass(frozen=True)
class Shares:
    """What was found.

    Args:
        of_layer: share of zeros of each layer.
        facts: for the records.
    """

    of_layer: Mapping[int, float]
    facts: Mapping[str, Any]


def searched_shares(
    run: SweepRun,
    groups: Groups,
    calibration: Calibration,
    fold: Fold | None,
    prune: Callable[[float], Edit],
    compared: Compared,
    share: float,
    how: ShareAllocation,
    search: ShareSearch,
) -> Shares:
    """Search for a share of zeros of each layer whose total is that of one share for all.

    Args:
        run: the run's part; its model is as it was afterwards.
        groups: the linears that are pruned.
        calibration, fold: of the statistics; no fold where edits want none.
        prune: the edit that prunes a group at a share.
        compared: the sets of weights of which each loses its share.
        share: asked for.
        how: "uniform" searches nothing.
        search: see `ShareSearch`.

    Raises:
        ResourceError: the model lies on disk.
        RecipeError: no other share is in reach.
        CompressoError: as `sweep` and `candidate_divergence`.
    """
    if how == ShareAllocation.UNIFORM:
        return Shares(dict.fromkeys(groups, share), {})
    if run.offloaded is not None:
        raise ResourceError(
            f"allocation={how} puts candidates together in memory; start stage '{run.stage}' without --offload, or take"
            " allocation: uniform"
        )
    shapes = {
        layer: [tuple(matrix(run.model, name).shape) for group in here for name in group.names]
        for layer, here in groups.items()
    }
    entries = {layer: sum(map(math.prod, of)) for layer, of in shapes.items()}
    sets = {layer: [one for shape in of for one in compared(*shape) if all(one)] for layer, of in shapes.items()}
    grid = share_grid(share, [size for of in sets.values() for _, size in of], search.reach, search.step)
    if len(grid) < 2:
        raise RecipeError(f"no share but {share} is within reach={search.reach} of it; raise reach or lower step")
    before = fingerprints(dict(run.model.named_parameters()))
    same = {**run.same(before), "grid": grid}
    store = LevelStore(run.folder / "levels", digest(same), run.model, groups)
    _fill(run, groups, calibration, fold, [prune(one) for one in grid], store)
    items = [
        Item(f"layers.{layer}", tuple(float(entries[layer] - zeros_at(one, of)) for one in grid))
        for layer, of in sets.items()
    ]
    start, dense = (grid.index(share),) * len(items), (len(grid),) * len(items)
    rows = Calibration(search.examples, search.batch).batches(run.rows, mixed_seed("shares", run.seed))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in rows]
    sizes, last = search.evolution.sizes(len(batches)), search.evolution.last
    most = 2 + len(items) * len(grid) + (sum(search.evolution.most) if how == ShareAllocation.EVOLVE else 0)
    blocks = run.arch.blocks(run.model)
    with (
        candidate_divergence(run.model, blocks, list(groups), store.install, dense, batches, sizes) as divergence,
        journalled(
            divergence, RoundJournal(run.folder / "shares", same, run.ranks), most, run.progress, "shares", run.ranks
        ) as fitness,
    ):
        found = search_levels(
            Search(how),
            _measured(items, dense, fitness),
            sum(item.costs[start[0]] for item in items),
            start,
            fitness,
            search.evolution,
            seed=mixed_seed("shares", run.seed),
            adopted=divergence.adopt,
        )
        known = dict(found.finalists)
        facts = {
            "how": str(how),
            "grid": grid,
            "divergence": found.fitness,
            "divergence_uniform": recorded([known[start] if start in known else fitness(start, last)])[0],
            "calibration": divergence.facts,
            "history": recorded(found.history),
            "candidates": list(found.tried),
        }
    of_layer = {layer: grid[level] for layer, level in zip(groups, found.levels, strict=True)}
    return Shares(of_layer, {**facts, "shares": {str(layer): one for layer, one in of_layer.items()}})


def _measured(items: Sequence[Item], dense: Levels, fitness: Fitness) -> list[Item]:
    """The items with the error of each share alone; to stay dense is a level only for that."""
    whole = [replace(item, costs=(*item.costs, item.costs[0])) for item in items]
    return [
        replace(item, errors=one.errors[:-1])
        for item, one in zip(items, with_errors(whole, dense, fitness), strict=True)
    ]


def _fill(
    run: SweepRun,
    groups: Groups,
    calibration: Calibration,
    fold: Fold | None,
    edits: Sequence[Edit],
    store: LevelStore,
) -> None:
    """Keep the levels of the layers that are not kept yet."""
    missing = run.ranks.agreed({layer for layer in groups if not store.has(layer)})
    made: list[dict[str, Tensor]] = [{} for _ in edits]

    @torch.no_grad()
    def look(group: Group, seen: Stats) -> Mapping[str, Any]:
        if group.layer not in missing:
            return {}
        for level, edit in zip(made, edits, strict=True):
            dense = {name: weight_of(run.model, name).detach().clone() for name in group.names}
            edit(group, seen)
            level.update({name: weight_of(run.model, name).detach().clone() for name in group.names})
            for name, weight in dense.items():
                weight_of(run.model, name).copy_(weight)
        if group is groups[group.layer][-1]:
            if run.ranks.is_main:
                store.write(group.layer, made)
            for level in made:
                level.clear()
        return {}

    if not missing:
        return
    if fold is None:
        for group in (group for here in groups.values() for group in here):
            look(group, NOTHING_SEEN)
        run.ranks.wait()
        return
    sweep(
        run.model,
        run.arch,
        groups,
        calibration.batches(run.rows, run.seed),
        fold,
        look,
        place=calibration.activations,
        scratch=run.folder / "look",
        collect_only=True,
        progress=run.progress,
        name="levels",
        ranks=run.ranks,
    )
    run.ranks.wait()
