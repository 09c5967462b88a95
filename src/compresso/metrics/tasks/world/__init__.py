"""The embedded suite as lm_eval tasks: multiple choice, items of the world that no training instruction asks about, no
network.

The YAMLs beside this file are ordinary ones; with compresso installed, `lm_eval --include_path` of this folder runs
them too. Items are worded like a training example without its response, and their choices follow directly, so scores
compare with `compresso.metrics.choices`.
"""

from typing import TYPE_CHECKING

from compresso.data import world
from compresso.data.prompt import body

if TYPE_CHECKING:
    from datasets import DatasetDict


def dataset(task: str, n: int, seed: int, **_metadata: object) -> "DatasetDict":
    """Split "test" of one task: `n` rows {question, choices, answer}; the harness adds the metadata of the YAML.

    Raises:
        DataError: an unknown task, or more items than there are.
    """
    from datasets import Dataset, DatasetDict

    rows = [
        {"question": body(item.instruction, item.input), "choices": list(item.choices), "answer": item.answer}
        for item in world.items(task, n, seed)
    ]
    return DatasetDict({"test": Dataset.from_list(rows)})
