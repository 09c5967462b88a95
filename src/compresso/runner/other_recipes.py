"""Which recipes take a model that a recipe of next tokens cannot: naming its task alone would lead from one refusal to
the next.
"""

from transformers import PreTrainedConfig

from compresso.runner.recipe import Recipe, task_of
from compresso.runner.recipe_file import names, read
from compresso.stage import card
from compresso.tasks.base import DEFAULT, task_named, tasks

ANY_TASK = "gate-taylor"
"""A recipe that prunes whatever has axes, by gradients of the task's own loss."""


def of_next_tokens(recipe: Recipe, config: PreTrainedConfig) -> str:
    """Why no task makes a recipe take a model, with the recipes that do; "" where one may, or no task takes it.

    Args:
        recipe: under the task of causal language models.
        config: of a model that does another.
    """
    own = next((name for name, _ in recipe.stages if not card(name).any_task), None)
    able = [name for name, task in tasks().items() if name != DEFAULT and not task.obstacle(config)]
    if own is None or recipe.task.name != DEFAULT or not able:
        return ""
    own_task = [name for name in names() if "/" not in name and task_of(read(name)).name in able]
    texts = [name for name in able if task_named(name).reads_text or not own_task]  # segmenters differ in their stages
    said = [*own_task, *(f"{ANY_TASK} --task {name}" for name in texts)]
    return (
        f"({config.model_type}) is no causal language model, and stage '{own}' works on next tokens; give another"
        f" recipe: {', '.join(said[:-1])}{' or ' if said[:-1] else ''}{said[-1]}"
    )
