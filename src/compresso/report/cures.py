"""Which commands measure what a comparison lacks: those that take its models, and no others.

`compresso measure` and most of `compresso evaluate` are for models that write text. A model of another task is scored
on examples of it, and nothing else of it is measured by a command.
"""

from compresso.metrics.record import ModelResults
from compresso.report.columns import group
from compresso.report.read import Comparison
from compresso.report.table import missing
from compresso.tasks.base import task_named, tasks

TRAINED_FOR = "trained_for"
"""The setting that tells numbers of a task from those of models that write text."""


def cure(comparison: Comparison) -> str:
    """A sentence on the commands that measure what is missing, their names in backquotes; empty where all is there.

    Models of which no run and no number tells the task are taken for models that write text.
    """
    if not missing(comparison):
        return ""
    asked = list(dict.fromkeys(_task(comparison, one) for one in comparison.models))
    told: list[str] = []
    if texts := [name for name in asked if name is None or task_named(name).writes_text]:
        told.append("`compresso evaluate` and `compresso measure` do that")
    have = {group(number.name) for one in comparison.models for number in one.measurements}
    for name in asked:
        if name is None or name in texts:
            continue
        if group(task_named(name).metric) not in have:
            told.append(f"`compresso evaluate --task {name} --data FILE` scores a model of {name}")
        else:
            told.append(f"no command measures more of a model of {name} than `compresso evaluate --task {name}` does")
    said = "; ".join(told)
    return f"{said[0].upper()}{said[1:]}."


def _task(comparison: Comparison, results: ModelResults) -> str | None:
    """What a model was trained for, by the runs that wrote it or began with it, or by its numbers; None where nothing
    tells.
    """
    for run in comparison.runs:
        if results.fingerprint in (run.result, run.base):
            return run.records.recipe.task
    found = (one.protocol.get(TRAINED_FOR) for one in results.measurements)
    return next((str(one) for one in found if one in tasks()), None)
