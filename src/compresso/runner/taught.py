"""What a training could not do with the examples and the teacher it will have, said before anything is trained.

A run may train for hours before the stage whose knobs cannot be met.
"""

from collections.abc import Sequence

from compresso.core.plan import Plan
from compresso.errors import RecipeError
from compresso.runner.recipe import DataKnobs
from compresso.stage import ChecksTaught, Learning, Learns, Stage, Watches, groups_of


def check_taught(
    name: str, stage: Stage, before: Sequence[str], layers: int, dense: int, removed: Plan, data: DataKnobs
) -> None:
    """Refuse a stage that would stop where it begins to train.

    Args:
        name: of the stage.
        stage: as it meets the model.
        before: names of the stages that stand before it.
        layers, dense: layers of the model that it meets, and of the dense one.
        removed: what the stages before it took.
        data: the recipe's.

    Raises:
        RecipeError: naming the stage, and what to change.
    """
    if isinstance(stage, ChecksTaught):
        stage.check_taught(layers, dense, removed)
    for group in groups_of(stage).values():
        if isinstance(group, Watches) and group.evaluations and not data.held:
            raise RecipeError(
                f"stage '{name}': evaluations={group.evaluations} looks at held-out examples, and data.held=0 holds"
                " none out; raise data.held, or give evaluations: 0"
            )
    if isinstance(stage, Learns) and _by_tokens(stage.learning()) and "cut_vocab" in before:
        raise RecipeError(
            f"stage '{name}' learns from the dense model, and 'cut_vocab' before it takes tokens out that the dense"
            f" model has: no token is comparable. Put 'cut_vocab' behind '{name}'"
        )


def _by_tokens(learning: Learning) -> bool:
    """Whether the dense model teaches, whose outcomes must be the same."""
    return learning.teacher and learning.other is None and learning.updates != 0
