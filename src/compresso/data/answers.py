"""Questions about a text whose answers are parts of it (SQuAD, arXiv 1606.05250), and windows to find them in.

    question, context, and answers: {"text": [...], "answer_start": [...]}, or [{"text": ..., "answer_start": ...}]
    title, by which examples are split; else the context stands for it
    {"data": [{"title": ..., "paragraphs": [{"context": ..., "qas": [{"question": ..., "answers": ...}]}]}]}, a .json
        file as SQuAD's authors publish it

A text that is longer than a row is read in windows that overlap. A window without the answer points at its first token,
as in BERT's code (arXiv 1810.04805, section 4.2), so that every window says where the answer is not. A question whose
answers are none (SQuAD 2, arXiv 1806.03822) has no window with one, and is trained like that.
"""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from compresso.core.answer_window import AnswerWindow
from compresso.core.counted import counted
from compresso.core.plain_values import shown, whole_number
from compresso.core.row import Row
from compresso.data.record_forms import BadRecord, RecordForm, Taken, text_of, type_name, unused_of
from compresso.data.records import Answered, Records
from compresso.data.survival import Encoded, Stats
from compresso.errors import DataError

_WANTED = "question, context and answers with text and answer_start"
_USED = ("question", "context", "answers", "title", "is_impossible")
_TOGETHER = 256  # questions tokenised in one call
_LONGEST_QUESTION, _OVERLAP = 64, 128
_LEAST = 32


def parse_answered(value: object) -> Answered:
    """The question that `value` describes. Raises BadRecord, saying what is missing."""
    if not isinstance(value, Mapping):
        raise BadRecord(f"holds {type_name(value)}; wanted an object with {_WANTED}")
    if not {"question", "context", "answers"} <= set(value):
        found = ", ".join(str(name) for name in list(value)[:8]) or "none"
        raise BadRecord(f"fields are: {found}; wanted {_WANTED}")
    question, context = text_of(value, "question"), text_of(value, "context")
    for name, text in (("question", question), ("context", context)):
        if not text.strip():
            raise BadRecord(f"field '{name}' is empty")
    answers = tuple(dict.fromkeys(_answers(value["answers"])))
    impossible = value.get("is_impossible")
    if impossible is not None and not isinstance(impossible, bool):
        raise BadRecord(f"field 'is_impossible' is {shown(impossible)}; wanted true or false")
    if impossible is not None and impossible is not (not answers):
        raise BadRecord(
            f"field 'is_impossible' is {shown(impossible)}, and field 'answers' holds {len(answers)}; wanted true"
            " beside none, false beside some"
        )
    for text, begin in answers:
        if not text.strip() or context[begin : begin + len(text)] != text or begin < 0:
            raise BadRecord(f"answer {text[:40]!r} does not stand at character {begin} of the context")
    title = text_of(value, "title") if value.get("title") is not None else ""
    return Answered(question, context, answers, title)


def take_answered(value: object) -> Taken:
    """The same, and the columns that were not read. Raises BadRecord."""
    record = parse_answered(value)
    assert isinstance(value, Mapping)  # else it was refused
    return Taken(record, unused_of(value, _USED), tuple(name for name in _USED if name in value))


def nested(value: Mapping[object, object]) -> Iterator[tuple[str, object, str]]:
    """Each question of a file as SQuAD's authors publish it: its place in words, the question, and what is wrong where
    no list of them is; what is no question is given as it is, for `take_answered` to refuse.
    """
    for i, article in enumerate(_listed(value, "data"), 1):
        if isinstance(article, _Unlisted):
            yield "", None, article.wrong
            continue
        for j, paragraph in enumerate(_listed(article, "paragraphs"), 1):
            if isinstance(paragraph, _Unlisted):
                yield f"article {i}", None, paragraph.wrong
                continue
            for k, asked in enumerate(_listed(paragraph, "qas"), 1):
                if isinstance(asked, _Unlisted):
                    yield f"article {i}, paragraph {j}", None, asked.wrong
                    continue
                place = f"article {i}, paragraph {j}, question {k}"
                around = {"title": _of(article, "title"), "context": _of(paragraph, "context")}
                yield place, {**around, **asked} if isinstance(asked, Mapping) else asked, ""


@dataclass(frozen=True)
class _Unlisted:
    """What stands where a list is wanted, in the words of the message."""

    wrong: str


def _listed(value: object, name: str) -> Sequence[object]:
    """What an object lists under a name; without the name the value itself, so that it is seen and refused."""
    if not isinstance(value, Mapping) or name not in value:
        return [value]
    found = value[name]
    return found if isinstance(found, list) else [_Unlisted(f"field '{name}' is {type_name(found)}; wanted a list")]


def _of(value: object, name: str) -> object:
    return value.get(name) if isinstance(value, Mapping) else None


ANSWERED = RecordForm(_USED, take_answered, _WANTED, nested)
"""Rows of extractive question answering."""


def encode_answered(
    records: Records,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    limit: int | None = None,
    vocab_size: int | None = None,
    segments: bool = False,
    learns: bool = True,
) -> Encoded:
    """Tokenise each question with windows of its text; an answer is where the first of its answers is, and at the first
    token where there is none.

    Args:
        records: questions.
        tokenizer: one that says where its tokens begin and end.
        max_length: most tokens of a window; 64 or a third of them are the question's, and windows overlap by 128 or a
            third.
        limit: most questions, evenly spaced ones.
        vocab_size: ids must be smaller.
        segments: whether the model tells question and text apart by type ids.
        learns: whether a model is trained on them, for which some need an answer.

    Raises:
        DataError: the tokenizer does not say where tokens lie, rows are too short, an id is outside the vocabulary, or
            no question that a model is to learn from has an answer.
    """
    if not tokenizer.is_fast:
        raise DataError(
            "the tokenizer does not say where its tokens lie in the text; write tokenizer.json, which is read with one"
            " that does"
        )
    if max_length < _LEAST:
        raise DataError(f"max_length={max_length}: wanted at least {_LEAST}, for a question and some of its text")
    n = len(records.rows)
    places = range(n) if limit is None or limit >= n else [i * n // limit for i in range(limit)]
    sources = [name for name, part in records.by_source() for _ in part]
    chosen = [(i, sources[i], row) for i in places if isinstance(row := records.rows[i], Answered)]
    unanswered = sum(not row.answers for _, _, row in chosen)
    if learns and chosen and unanswered == len(chosen):
        raise DataError(
            f"{records.source}: no question has an answer, so there is nothing to learn; give some that have"
        )
    rows: list[Row] = []
    unseen = 0
    for start in range(0, len(chosen), _TOGETHER):
        some = chosen[start : start + _TOGETHER]
        questions = _cut([row.question for _, _, row in some], tokenizer, min(_LONGEST_QUESTION, max_length // 3))
        made: Any = tokenizer(
            questions,
            [row.context for _, _, row in some],
            truncation="only_second",
            max_length=max_length,
            stride=min(_OVERLAP, max_length // 3),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=segments,
        )
        seen: set[int] = set()
        for window, which in enumerate(made["overflow_to_sample_mapping"]):
            number, source, answered = some[which]
            row = _window(made, window, number, answered, segments, unanswered > 0)
            row["source"] = source
            rows.append(row)
            if row["labels"] != [0, 0]:
                seen.add(which)
        unseen += sum(bool(row.answers) for _, _, row in some) - len(seen)
    highest = max((max(row["input_ids"]) for row in rows), default=0)
    if vocab_size is not None and highest >= vocab_size:
        raise DataError(
            f"{records.source}: the tokenizer gives id {highest}, the vocabulary has {vocab_size}; use the tokenizer"
            " that belongs to the model"
        )
    tokens = sum(len(row["input_ids"]) for row in rows)
    gives = "gives" if len(chosen) == 1 else "give"
    windows = counted(len(rows), "window")
    notes = [f"{counted(len(chosen), 'question')} {gives} {windows} of {max_length} tokens at most"]
    if unanswered:
        notes.append(f"{unanswered:,} of {len(chosen):,} questions have no answer: the first token stands for none")
    if unseen:
        notes.append(f"{unseen:,} answers lie whole in no window")
    if any(not row.title for _, _, row in chosen):
        notes.append("rows without a title are split by their context")
    stats = Stats(len(chosen), 0, 0, 0, len(rows), tokens, 2 * len(rows), read=n)
    return Encoded(rows, stats, notes=tuple(notes))


def _answers(value: object) -> list[tuple[str, int]]:
    """Texts and beginnings, of a dictionary of lists or a list of dictionaries. Raises BadRecord."""
    wanted = "wanted {'text': [...], 'answer_start': [...]}"
    pairs: list[tuple[object, object]]
    if isinstance(value, Mapping):
        texts, begins = value.get("text"), value.get("answer_start")
        if not isinstance(texts, list | tuple) or not isinstance(begins, list | tuple) or len(texts) != len(begins):
            raise BadRecord(f"field 'answers' has no lists text and answer_start of one length; {wanted}")
        pairs = list(zip(texts, begins, strict=True))
    elif isinstance(value, list) and all(isinstance(one, Mapping) for one in value):
        pairs = [(one.get("text"), one.get("answer_start")) for one in value]
    else:
        raise BadRecord(f"field 'answers' is {type_name(value)}; {wanted}")
    found: list[tuple[str, int]] = []
    for text, begin in pairs:
        if not isinstance(text, str):
            raise BadRecord(f"the text of an answer is {shown(text)}; wanted a string")
        if (place := whole_number(begin)) is None:
            raise BadRecord(
                f"answer_start of {text[:40]!r} is {shown(begin)}; wanted a whole number, the character at which it"
                " begins"
            )
        found.append((text_of({"text": text}, "text"), place))
    return found


def _cut(questions: Sequence[str], tokenizer: PreTrainedTokenizerBase, most: int) -> list[str]:
    """Questions without what lies behind their first `most` tokens."""
    made: Any = tokenizer(list(questions), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [
        question if len(spans) <= most else question[: spans[most - 1][1]]
        for question, spans in zip(questions, made["offset_mapping"], strict=True)
    ]


def _window(made: Any, window: int, number: int, answered: Answered, segments: bool, open: bool) -> Row:
    """One window as a row; open: whether any question has no answer."""
    inside = [part == 1 for part in made.sequence_ids(window)]
    spans = made["offset_mapping"][window]
    begins = array("i", [begin if real else -1 for (begin, _), real in zip(spans, inside, strict=True)])
    ends = array("i", [end if real else -1 for (_, end), real in zip(spans, inside, strict=True)])
    texts = tuple(text for text, _ in answered.answers)
    row = Row(
        input_ids=list(made["input_ids"][window]),
        labels=_place(begins, ends, answered),
        window=AnswerWindow(number, answered.title or answered.context, answered.context, texts, begins, ends, open),
    )
    if segments:
        row["token_type_ids"] = list(made["token_type_ids"][window])
    return row


def _place(begins: Sequence[int], ends: Sequence[int], answered: Answered) -> list[int]:
    """The first and the last token of the first answer; the first token of all where the window has not all of it, or
    there is none.
    """
    if not answered.answers:
        return [0, 0]
    text, begin = answered.answers[0]
    end = begin + len(text)
    touching = [
        i for i, (low, high) in enumerate(zip(begins, ends, strict=True)) if low >= 0 and low < end > begin < high
    ]
    real = [i for i, low in enumerate(begins) if low >= 0]
    if not touching or begins[real[0]] > begin or ends[real[-1]] < end:
        return [0, 0]
    return [touching[0], touching[-1]]
