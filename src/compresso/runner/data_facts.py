"""What a plan says of data: how many examples survive, how many tokens they hold, and what an epoch is in updates."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from compresso.checkpoint.source import Source
from compresso.core.counted import survivors
from compresso.data.survival import Encoded, check_dropped
from compresso.errors import DataError, RecipeError
from compresso.runner.acted import Acted
from compresso.runner.examples import fewer_than_asked, read_examples
from compresso.runner.recipe import Recipe
from compresso.runner.rounds import learning_of
from compresso.wording import worded

_NAMED_CLASSES = 8


def data_facts(
    recipe: Recipe,
    raw: Mapping[str, Any],
    data: str,
    source: Source,
    stages: Sequence[Acted],
    *,
    skip_bad: bool,
    allow_dropped: bool = False,
) -> dict[str, Any]:
    """Read data as a run would, and count.

    Args:
        recipe, raw: checked, and as it was written.
        data: names and files.
        source: the model, of which the config and the tokenizer are read.
        stages: as the dry run found them.
        skip_bad: leave bad lines out.
        allow_dropped: whether the run would go on where too much is dropped.

    Returns:
        {"source", "kind", "columns" (read -> rows), "examples" (counts, see `compresso.data.survival.Stats`),
        "survive", "train", "held", "max_length", "notes", "stops" (why a run would, or None), "epochs" (for each stage
        that trains: its batch, the updates of an epoch, and those it takes)}.

    Raises:
        DataError: for all that a run would refuse, except that too much is dropped: that is said in "stops".
        RecipeError: the recipe uses no data.
    """
    if not recipe.needs("data"):
        raise RecipeError(f"recipe {recipe.name} uses no data, but --data {data} was given; leave it out")
    read = read_examples(recipe, raw, data, source, skip_bad=skip_bad, allow_dropped=True)
    assert read.records is not None and read.encoded is not None and read.reading is not None  # the recipe needs data
    stops = None
    try:
        check_dropped(read.records, read.encoded, read.reading.reach(), allow_dropped)
    except DataError as error:  # a value that is handed back, which no public function puts into its caller's words
        stops = worded(str(error), ("allow_dropped", "sets"))
    train = len(read.encoded.rows) - read.recipe.data.held
    return {
        "source": read.records.source,
        "kind": read.records.kind,
        "columns": dict(read.records.columns),
        "examples": asdict(read.encoded.stats),
        "survive": survivors(asdict(read.encoded.stats)),
        "train": train,
        "held": read.recipe.data.held,
        "max_length": read.recipe.data.max_length,
        "notes": [*_classes(read.encoded), *read.said, *fewer_than_asked(stages, train)],
        "stops": stops,
        "epochs": [
            {
                "stage": one.name,
                "batch": one.learning.trains.batch,
                "updates_an_epoch": math.ceil(train / one.learning.trains.batch),
                "updates": _updates(one, train),
            }
            for one in stages
            if one.learning is not None
        ],
    }


def _updates(one: Acted, train: int) -> int:
    """Updates that a stage takes in its round, on so many training examples."""
    whole = one.learning if one.act is None else learning_of(one.act.stage)
    assert whole is not None  # asked of stages that train
    total = sum(whole.trains.updates(train, whole.phases))
    return total if one.act is None else one.act.updates(total)


def _classes(encoded: Encoded) -> list[str]:
    """A sentence on the classes of labelled examples, in the order of the head's outputs; none for other examples."""
    if not encoded.labels:
        return []
    if not all(row["labels"] for row in encoded.rows):  # each pixel has one
        return [f"{len(encoded.labels)} classes"]
    counts = Counter(row["labels"][0] for row in encoded.rows)
    named = [f"{name} ({counts[i]:,})" for i, name in enumerate(encoded.labels[:_NAMED_CLASSES])]
    more = len(encoded.labels) - len(named)
    return [f"{len(encoded.labels)} classes: {', '.join(named)}{f', and {more} more' if more else ''}"]
