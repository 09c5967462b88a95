"""The data of a run: what it is read with, the rows that come of it, and what a person should know before it begins."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from compresso.arch.context import positions_of
from compresso.checkpoint.pixels import pixel_input, unsaid_colours
from compresso.checkpoint.source import Source
from compresso.checkpoint.tokenizer import has_tokenizer, load_tokenizer
from compresso.core.counted import counted
from compresso.core.row import Row
from compresso.data.batches import padding_note
from compresso.data.instructions import encode_prompt
from compresso.data.records import Records
from compresso.data.registry import load_records
from compresso.data.survival import Encoded, check_dropped, told
from compresso.data.tokens import refuse_ids
from compresso.errors import DataError
from compresso.runner.acted import Acted
from compresso.runner.generated import with_generated
from compresso.runner.recipe import Recipe
from compresso.tasks.base import DEFAULT, Reading, Task


@dataclass(frozen=True)
class Examples:
    """What a recipe reads.

    Args:
        recipe: with the length of its examples and the number of those held out.
        tokenizer: None for a model without one, in a recipe without data or with ready token windows.
        records, encoded, reading: the data, and how it was read; None in a recipe without.
        said: what a person should know of it, a sentence each.
    """

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase | None
    records: Records | None = None
    encoded: Encoded | None = None
    reading: Reading | None = None
    said: tuple[str, ...] = ()


def read_examples(
    recipe: Recipe,
    raw: Mapping[str, Any],
    data: str | None,
    source: Source,
    *,
    skip_bad: bool = False,
    allow_dropped: bool = False,
    quiet: bool = False,
) -> Examples:
    """Read and tokenise the training data, if the recipe needs any.

    Args:
        recipe: checked.
        raw: as it was written, to know which knobs are its own.
        data: names and files.
        source: the model.
        skip_bad: leave bad lines out, and conversations that the chat template refuses.
        allow_dropped: go on where a source loses more than a run may lose.
        quiet: show no progress.

    Raises:
        DataError: there is none, it cannot be read, too much of it gives no example, or nothing would be left to train
            on.
        CheckpointError: the model has no tokenizer to read it with.
    """
    recipe, context = within_context(recipe, source.config), positions_of(source.config)
    size = vocabulary(source.config)
    reads_text = recipe.task.reads_text
    if not recipe.needs("data"):
        tokenizer = load_tokenizer(source) if reads_text and has_tokenizer(source) else None
        _check_own_ids(recipe, tokenizer, size)
        return Examples(recipe, tokenizer)
    if data is None:
        raise DataError(f"recipe {recipe.name} needs data; {_such_data(recipe.task)}")
    records = load_records(with_generated(data, source, quiet), skip_bad=skip_bad, form=recipe.task.form)
    bare = records.kind == "window" and not has_tokenizer(source)
    tokenizer = load_tokenizer(source) if reads_text and not bare else None
    pixels = None if reads_text else pixel_input(source)
    _check_own_ids(recipe, tokenizer, size)
    knobs = recipe.data
    asked = (knobs.max_length, knobs.prompt, knobs.pack, knobs.limit, skip_bad, context, knobs.train_on_inputs)
    reading = Reading(*asked, pixels)
    encoded = recipe.task.encode(records, tokenizer, reading, source.config)
    check_dropped(records, encoded, reading.reach(), allow_dropped)
    said = notes_of(records, encoded, knobs.max_length, tokenizer, size)
    if pixels is not None and (unsaid := unsaid_colours(source)):
        said.append(f"{source.name} is a config alone; {unsaid}")
    if knobs.train_on_inputs and records.kind in ("text", "window"):
        said.append(f"data.train_on_inputs is of conversations; {records.source} holds none, and all of it is learned")
    recipe, rows = _held_out(recipe, raw, encoded.rows, data), len(encoded.rows)
    if 2 * (held := recipe.data.held) > rows:
        fewer = held > len(recipe.task.held_places(encoded.rows, 1))
        cure = "lower data.held" if fewer else "what shares a title or a text is held out together: give more of others"
        said.append(f"{held} of {counted(rows, 'example')} are held out, more than stay to learn from; {cure}")
    return Examples(recipe, tokenizer, records, encoded, reading, tuple(said))


def notes_of(
    records: Records,
    encoded: Encoded,
    max_length: int,
    tokenizer: PreTrainedTokenizerBase | None,
    size: int | None,
    limit: str = "data.limit",
) -> list[str]:
    """What a person should know of data that is gone on with, a sentence each; nothing for most.

    Args:
        records, encoded: the data.
        max_length: tokens that examples are cut at.
        tokenizer: that they were read with, if any.
        size: rows of the embedding, where it is known.
        limit: what says how many records are looked at.
    """
    said = told(records, encoded, max_length, limit)
    if tokenizer is not None and size is not None and (note := padding_note(tokenizer, size)):
        said.append(note)
    return said


def _such_data(task: Task) -> str:
    """What to give a task to read."""
    if task.name == DEFAULT:
        return "give --data with a registered name or a local file, such as --data alpaca-gpt4"
    return f"give --data with a local file or a data set of the hub for --task {task.name}: {task.form.wanted}"


def within_context(recipe: Recipe, config: PreTrainedConfig) -> Recipe:
    """The recipe with examples no longer than a model's context: those would train positions that it does not have."""
    longest = recipe.data.max_length
    return replace(recipe, data=replace(recipe.data, max_length=min(longest, positions_of(config) or longest)))


def _check_own_ids(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None, size: int | None) -> None:
    """Refuse a tokenizer whose own tokens, which a run writes before texts and questions at its end, have no row.

    Raises DataError.
    """
    if tokenizer is None or size is None or not recipe.task.writes_text:
        return
    if isinstance(tokenizer.bos_token_id, int):
        refuse_ids([tokenizer.bos_token_id], size, f"the tokenizer's beginning token {tokenizer.bos_token!r}")
    try:
        asked = encode_prompt(tokenizer, "Name a colour.", prompt_on=False)
    except DataError:  # a template that refuses one question is met where there are some
        return
    refuse_ids(
        asked, size, "a token that the chat template writes" if tokenizer.chat_template else "a token of a question"
    )


def vocabulary(config: PreTrainedConfig) -> int | None:
    """Rows of a model's embedding, where it has one."""
    size = getattr(config, "vocab_size", None)
    return size if isinstance(size, int) else None


def fewer_than_asked(stages: Sequence[Acted], n: int) -> list[str]:
    """A sentence for each stage that wants to look at more examples than the `n` that there are."""
    told = [
        f"{one.name}: {passed.what} on the {counted(n, 'example')} that there {'is' if n == 1 else 'are'}, of the"
        f" {passed.examples:,} it asks for"
        for one in stages
        for passed in one.passes
        if passed.what == "calibration" and passed.examples is not None and passed.examples > n
    ]
    return list(dict.fromkeys(told))  # the dense model may look, too


def _held_out(recipe: Recipe, raw: Mapping[str, Any], rows: Sequence[Row], data: str | None) -> Recipe:
    """The recipe with the number of examples that are held out: its own, else as many as its task wants. Raises
    DataError if none would be left.
    """
    n_rows, own = len(rows), "held" in (raw.get("data") or {})
    held = recipe.data.held if own else recipe.task.held_out(n_rows)
    if n_rows > held:
        held = len(recipe.task.held_places(rows, held))
    if n_rows <= held:
        gives = f"{data} gives {counted(n_rows, 'example')}"
        if whole := recipe.task.undivided(rows):
            raise DataError(f"{gives}, {whole}")
        raise DataError(f"{gives}, of which {held} are held out; give more, or lower data.held")
    return replace(recipe, data=replace(recipe.data, held=held))
