"""Whether the shapes that an engine wants leave a budget within reach; the nearest one that they do, where not."""

from compresso.checkpoint.source import Source
from compresso.errors import BudgetError
from compresso.runner.asked_budget import Asked
from compresso.runner.dry_run import dry_run
from compresso.runner.recipe import Recipe

WITHIN = 0.02
"""Of what the budget counts: by how much shapes may miss it."""


def check_target(recipe: Recipe, source: Source, target: str, asked: Asked | None = None) -> None:
    """Refuse an engine whose shapes miss a budget of the recipe by more than 2 % of the dense model.

    Args:
        recipe: with the engine's multiples in its budgets.
        source: the model; its shapes are enough.
        target: the engine as it was asked for.
        asked: the budget, where it was not asked for as a share.

    Raises BudgetError, naming the share that those shapes leave, and what else can be done.
    """
    for met in dry_run(recipe, source).budgets:
        if abs(met.share - met.wanted) <= WITHIN:
            continue
        if met.share > 1 - 1e-9:
            raise BudgetError(
                f"--target {target}: its multiples are as large as what there is of {source.name}, so that nothing can"
                f" leave, and {met.wanted:g} of {met.of} are to stay; leave the target out, or take a model of larger"
                " widths"
            )
        cure = f"--keep {met.share:.4g}" if asked is None else str(asked.of_share(met.share / met.wanted))
        raise BudgetError(
            f"--target {target}: stage '{met.stage}' is to keep {met.wanted:g} of {met.of}, and its multiples leave"
            f" {met.share:.4g} at the nearest; give {cure}, or leave the target out"
        )
