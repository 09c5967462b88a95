"""A recipe for a task and a model: the task that is asked for, the head that a base model is given first, and the heads
that its config cannot count.
"""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from compresso.core.axis import Kind
from compresso.native import family_of, staged_family_of
from compresso.runner.data_knobs import reads
from compresso.runner.engine_shapes import held_to
from compresso.runner.recipe import task_of
from compresso.runner.recipe_file import stages_of
from compresso.tasks.base import DEFAULT, task_named

FIRST = "finetune"
"""The stage that gives a base model its head."""


def with_task(raw: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    """The raw recipe for another task, whose own data is then of the wrong kind and left out, as are settings of data
    that it does not read; None leaves it as it is.

    Raises RecipeError for an unknown task.
    """
    if name is None or (task := task_named(name)) is task_of(raw):
        return dict(raw)
    data = {} if raw.get("data") is None else raw["data"]
    if isinstance(data, Mapping):  # else it is refused with the recipe
        data = {key: value for key, value in data.items() if key != "source" and reads(task, str(key))}
    return {**raw, "task": name, "data": data}


def for_model(raw: Mapping[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """The raw recipe as a model needs it: `finetune` comes first where it lacks the task's head, and all heads stay
    where no config of its family could say that some are gone. Done once or twice, the same comes out.
    """
    task = task_of(raw)
    if task.name == DEFAULT or task.obstacle(config):
        return dict(raw)
    stages = stages_of(raw)
    if task.lacks_head(config) and FIRST not in [name for name, _ in stages]:
        raw = {**raw, "stages": [{FIRST: {}}, *({name: knobs} for name, knobs in stages)]}
    if not keeps_heads(config):
        return dict(raw)
    heads = getattr(config, "num_attention_heads", None)  # none where its backbone's config has them
    return held_to(raw, {Kind.HEAD: int(heads)}) if heads else dict(raw)


def keeps_heads(config: PreTrainedConfig) -> bool:
    """Whether a family's only form has no field for a head's width, so that fewer heads would be wider ones."""
    if family_of(config.model_type) is not None or staged_family_of(config.model_type) is not None:
        return False
    return getattr(config, "head_dim", None) is None
