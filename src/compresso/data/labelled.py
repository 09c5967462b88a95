"""Texts, or pairs of texts, with a label each: how a row is read, what the labels are called, and tokens of all of it.

    text or sentence, and label
    sentence1 + sentence2, premise + hypothesis, question1 + question2, question + sentence, text_a + text_b, or
        #1 String + #2 String (MRPC's own file), and label, gold_label (MNLI's) or Quality (MRPC's)

A label is a whole number, 1.0 being one, or a name. Names are numbered in alphabetical order, numbers in theirs, so the
order of the rows decides nothing. A label of -1, which test sets have in the place of one, is none. Of a model whose
classes are called by whole numbers a number is that class, of any other the class at that place.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from compresso.core.plain_values import shown, whole_number
from compresso.core.row import Row
from compresso.data.record_forms import BadRecord, RecordForm, Taken, text_of, type_name, unused_of
from compresso.data.records import Labelled, Pictured, Records
from compresso.data.survival import Encoded, Stats, of_one_class
from compresso.errors import DataError

_TEXTS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text_a", "text_b"),
    ("#1 String", "#2 String"),
    ("sentence", None),
    ("text", None),
)
_LABELS = ("label", "gold_label", "Quality")
_WANTED = "text, sentence, or sentence1 + sentence2, and label"
_HIDDEN = -1
_LISTED = 8
"""Classes that a message names."""
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")
_TOGETHER = 512  # rows tokenised in one call


def parse_labelled(value: object) -> Labelled:
    """The labelled text that `value` describes. Raises BadRecord, saying what is missing."""
    if not isinstance(value, Mapping):
        raise BadRecord(f"holds {type_name(value)}; wanted an object with {_WANTED}")
    names = next((names for names in _TEXTS if all(name is None or name in value for name in names)), None)
    named = next((name for name in _LABELS if name in value), None)
    if names is None or named is None:
        found = ", ".join(str(name) for name in list(value)[:8]) or "none"
        raise BadRecord(f"fields are: {found}; wanted {_WANTED}")
    texts = [text_of(value, name) for name in names if name is not None]
    for name, text in zip(names, texts, strict=False):
        if not text.strip():
            raise BadRecord(f"field '{name}' is empty")
    return Labelled(texts[0], texts[1] if len(texts) > 1 else None, label_of(value, named))


def label_of(value: Mapping[object, object], named: str) -> int | str:
    """The label in a field: a whole number, or a name. Raises BadRecord for anything else, and for -1."""
    given = label = value[named]
    if isinstance(label, str):
        label = text_of(value, named).strip()
        if _NUMBER.fullmatch(label):
            label = float(label) if "." in label else int(label)
    if not isinstance(label, str) and (label := whole_number(label)) is None:
        said = type_name(given) if isinstance(given, list | Mapping) else shown(given)
        raise BadRecord(f"field '{named}' is {said}; wanted a whole number or a name")
    if label == "" or label == _HIDDEN:
        raise BadRecord(
            f"field '{named}' is {label!r}, which is none: the rows of a test set can neither be learned from"
            " nor scored"
        )
    return label


def take_labelled(value: object) -> Taken:
    """The same, and the columns that were not read. Raises BadRecord."""
    record = parse_labelled(value)
    assert isinstance(value, Mapping)  # else it was refused
    names = next(names for names in _TEXTS if all(name is None or name in value for name in names))
    used = (*(name for name in names if name), next(name for name in _LABELS if name in value))
    return Taken(record, unused_of(value, used), used)


LABELLED = RecordForm(
    tuple(dict.fromkeys((*(name for names in _TEXTS for name in names if name), *_LABELS))), take_labelled, _WANTED
)
"""Rows of a classification."""


@dataclass(frozen=True)
class Labels:
    """The classes of a task.

    Args:
        names: in the order of their numbers.
        numbers: label as the data writes it -> its number.
    """

    names: tuple[str, ...]
    numbers: Mapping[int | str, int]


def labels_of(records: Records, known: Sequence[str] | None = None, learns: bool = True) -> Labels:
    """The classes of labelled records.

    Args:
        records: labelled ones.
        known: names of the classes of a model that has its head already; None for those of the data.
        learns: whether a model is trained on them, and could do so with a new head.

    Raises:
        DataError: numbers and names in one set of data, fewer than two labels, more than half as many as rows, or one
            that the model does not have.
    """
    counted = Counter(row.label for row in records.rows if isinstance(row, Labelled | Pictured))
    ints = sorted(label for label in counted if isinstance(label, int))
    words = sorted(label for label in counted if isinstance(label, str))
    if ints and words:
        at = " and ".join(_place_of(records, label) for label in (ints[0], words[0]))
        raise DataError(
            f"{records.source}: labels are numbers ({ints[0]}) and names ({words[0]!r}), at {at}; wanted one or the"
            " other"
        )
    if known is not None:
        called = _whole_numbers(known)
        numbers: dict[int | str, int] = {name: i for i, name in enumerate(known)}
        numbers |= {label: i for i, label in enumerate(called or range(len(known)))}
        for label in (*ints, *words):
            if label not in numbers:
                listed = ", ".join(name if called else f"{i} ({name})" for i, name in enumerate(known[:_LISTED]))
                listed += f" and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
                other = "start from a model without a head" if learns else "leave them out"
                raise DataError(
                    f"{_place_of(records, label)}: label {label!r} is none of the model's {len(known)}: {listed};"
                    f" relabel the rows, or {other}"
                )
        return Labels(tuple(known), numbers)
    if len(counted) < 2:
        raise DataError(f"{records.source}: all labels are {next(iter(counted), None)!r}; wanted at least two classes")
    if len(counted) > len(records.rows) / 2:
        raise DataError(
            f"{records.source}: {len(counted)} labels in {len(records.rows)} rows; wanted classes, each with several"
            " rows. Is 'label' the column of the classes?"
        )
    found = [*ints, *words]
    return Labels(tuple(map(str, found)), {label: i for i, label in enumerate(found)})


def _place_of(records: Records, label: int | str) -> str:
    """Where the first row with a label stands; there is one."""
    rows = enumerate(records.rows)
    return records.place(next(i for i, row in rows if isinstance(row, Labelled | Pictured) and row.label == label))


def _whole_numbers(names: Sequence[str]) -> list[int]:
    """The numbers that classes are called by, all different; none where some are called otherwise."""
    if not all(_NUMBER.fullmatch(name) and "." not in name for name in names):
        return []
    return found if len(set(found := [int(name) for name in names])) == len(found) else []


def known_names(config: PreTrainedConfig) -> tuple[str, ...]:
    """Names of the classes of a model that has a head, in the order of their numbers."""
    given = {int(number): str(name) for number, name in (config.id2label or {}).items()}
    return tuple(given.get(i, f"LABEL_{i}") for i in range(config.num_labels or len(given)))


def encode_labelled(
    records: Records,
    tokenizer: PreTrainedTokenizerBase,
    labels: Labels,
    max_length: int,
    limit: int | None = None,
    vocab_size: int | None = None,
    segments: bool = False,
) -> Encoded:
    """Tokenise texts with the tokenizer's own special tokens; of a pair the longer text is cut.

    Args:
        records: labelled ones.
        labels: all that occur in them.
        max_length: most tokens of a row.
        limit: most records, evenly spaced ones, so that data sorted by label keeps all of them.
        vocab_size: ids must be smaller.
        segments: whether the model tells the texts of a pair apart by type ids.

    Raises DataError: an id is outside the vocabulary, or not all rows are single texts or all are pairs.
    """
    n = len(records.rows)
    places = range(n) if limit is None or limit >= n else [i * n // limit for i in range(limit)]
    sources = [name for name, part in records.by_source() for _ in part]
    chosen = [(sources[i], row) for i in places if isinstance(row := records.rows[i], Labelled)]
    paired = {row.second is not None for _, row in chosen}
    if len(paired) > 1:
        two = [isinstance(row, Labelled) and row.second is not None for row in records.rows]
        at = " and ".join(records.place(two.index(whether)) for whether in (False, True))
        raise DataError(f"{records.source}: some rows hold one text and some two, such as {at}; wanted all of one kind")
    rows: list[Row] = []
    truncated = 0
    for start in range(0, len(chosen), _TOGETHER):
        some = chosen[start : start + _TOGETHER]
        texts = [[row.text for _, row in some], *([[row.second for _, row in some]] if True in paired else [])]
        made = tokenizer(
            *texts, truncation=True, max_length=max_length, return_token_type_ids=segments and True in paired
        )
        whole = tokenizer(*texts, verbose=False)
        for i, (source, row) in enumerate(some):
            one = Row(input_ids=list(made["input_ids"][i]), labels=[labels.numbers[row.label]], source=source)
            if segments and row.second is not None:
                one["token_type_ids"] = list(made["token_type_ids"][i])
            truncated += len(made["input_ids"][i]) < len(whole["input_ids"][i])
            rows.append(one)
    highest = max(max(row["input_ids"]) for row in rows)
    if vocab_size is not None and highest >= vocab_size:
        raise DataError(
            f"{records.source}: the tokenizer gives id {highest}, the vocabulary has {vocab_size}; use the tokenizer"
            " that belongs to the model"
        )
    tokens = sum(len(row["input_ids"]) for row in rows)
    stats = Stats(len(chosen), truncated, 0, 0, len(rows), tokens, len(rows), read=n)
    occur = {label for row in rows for label in row["labels"]}
    return Encoded(rows, stats, labels.names, notes=of_one_class(records.source, occur, labels.names))
