"""From records to token ids and labels: the loss falls on responses and their end token, or on every token of a plain
text.

A conversation is written out as one string, with its special tokens, and tokenised once, exactly as an engine tokenises
a rendered chat template. Characters decide the labels: a token is learned if any of its characters belongs to a
response, so a token that a BPE merged across the beginning of a response counts as response.

Departures from the authors' code (Compresso, arXiv 2310.05015): examples are cut at `max_length` (there, the cut is set
after the data was tokenised, and so does not act), and no [PAD] row is added to the embedding.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice

from transformers import PreTrainedTokenizerBase

from compresso.data.batches import IGNORED, Row
from compresso.data.conversations import templated_prompt, templated_transcript
from compresso.data.prompt import body, full_prompt, opening, user_turn
from compresso.data.records import Chat, Instruction, Message, Record, Records, Text, Window
from compresso.data.template import original_template, single_template, transcript
from compresso.data.tokens import Spans, bare_ids, bos_text, eos_text, ids_and_ends, label_spans
from compresso.errors import DataError

_TOGETHER = 512  # records tokenised in one call


@dataclass(frozen=True, slots=True)
class Stats:
    """What became of the records.

    Args:
        n: records that were looked at.
        truncated: examples cut at max_length.
        dropped: examples of which the cut left no token to learn.
        empty: records with an empty text or response, from which nothing can be learned.
        rows: rows made.
        tokens: tokens in those rows.
        response_tokens: tokens that have a label.
    """

    n: int
    truncated: int
    dropped: int
    empty: int
    rows: int
    tokens: int
    response_tokens: int


@dataclass(frozen=True, slots=True)
class Encoded:
    """Rows ready for batches, what became of the records they were made of, and names of their classes, if they have
    some.
    """

    rows: list[Row]
    stats: Stats
    labels: tuple[str, ...] = ()


@dataclass(slots=True)
class _Tally:
    truncated: int = 0
    dropped: int = 0
    empty: int = 0
    shortest_prompt: int | None = None


def encode(
    records: Records,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    prompt_on: bool,
    pack: bool = False,
    limit: int | None = None,
    vocab_size: int | None = None,
) -> Encoded:
    """Tokenise records.

    Args:
        max_length: most tokens of a row, the prompt included.
        prompt_on: put the collaborative prompt before instructions and conversations.
        pack: join the plain texts of a source, each between its beginning and end token, and cut the stream into rows
            of `max_length` (attention then crosses from one text to the next); otherwise each text is a row of its own,
            cut at `max_length`.
        limit: most records to look at: the first ones, or evenly spaced ones of a mix of kinds, so that every kind is
            met.
        vocab_size: ids must be smaller; the tokenizer's size if not given. Pass the model's where it is at hand.

    Raises:
        DataError: the tokenizer has no end token, an id is outside the vocabulary, a ready window is too long or all
            padding, or no record leaves anything to learn.
    """
    if max_length < 2:
        raise DataError(f"max_length={max_length}: wanted at least 2, because a prediction needs a token before it")
    if not tokenizer.eos_token:
        raise DataError(
            "the tokenizer has no end-of-sequence token, so no response would ever end; set tokenizer.eos_token"
        )
    tally = _Tally()
    chosen = _chosen(records, limit)
    rows: list[Row] = []
    for source, part in chosen.by_source():
        for row in _rows(part, tokenizer, max_length, prompt_on, pack, tally):
            row["source"] = source
            rows.append(row)
    size = len(tokenizer) if vocab_size is None else vocab_size
    for number, row in enumerate(rows, 1):
        if max(row["input_ids"]) >= size:
            raise DataError(
                f"{records.source}: row {number} holds id {max(row['input_ids'])}, the vocabulary has {size}; "
                "use the tokenizer that belongs to the model"
            )
    if not rows:
        raise DataError(_nothing_left(records, len(chosen.rows), max_length, prompt_on, tally))
    tokens = sum(len(row["input_ids"]) for row in rows)
    learned = sum(label != IGNORED for row in rows for label in row["labels"])
    return Encoded(
        rows, Stats(len(chosen.rows), tally.truncated, tally.dropped, tally.empty, len(rows), tokens, learned)
    )


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, instruction: str, input: str = "", prompt_on: bool = True
) -> list[int]:
    """The ids that stand before a response at inference, as in training: beginning token, collaborative prompt if on,
    body.
    """
    if (template := original_template(single_template(tokenizer))) is not None:
        text = templated_prompt(tokenizer, template, user_turn(instruction, input), prompt_on)
    else:
        text = bos_text(tokenizer) + full_prompt(instruction, input, prompt_on)
    return bare_ids(tokenizer, [text])[0]


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids with which every prompted example begins: beginning token and collaborative prompt, up to the user's
    header.

    They are to stand before a request that is not worded as an instruction, like those of likelihood tasks. Where a
    tokenizer merges the prompt's last line break with the header, that token is omitted.
    """
    head = bos_text(tokenizer) + opening("", prompt_on=True)
    ids, ends = ids_and_ends(tokenizer, [head + body(".")])[0]
    return ids[: bisect_right(ends, len(head))]


def _chosen(records: Records, limit: int | None) -> Records:
    """The records that are looked at, still by source."""
    n = len(records.rows)
    if limit is None or limit >= n:
        return records
    if limit < 1:
        raise DataError(f"limit={limit}: wanted at least 1 record")
    places = range(limit) if records.kind != "mixed" else [place * n // limit for place in range(limit)]
    ends = list(accumulate(size for _, size in records.parts))
    names = Counter(bisect_right(ends, place) for place in places) if ends else {}
    parts = tuple((name, names[i]) for i, (name, _) in enumerate(records.parts))
    return replace(records, rows=[records.rows[place] for place in places], parts=parts)


def _rows(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    prompt_on: bool,
    pack: bool,
    tally: _Tally,
) -> Iterator[Row]:
    stream: list[int] = []
    numbered = enumerate(records, 1)
    while together := list(islice(numbered, _TOGETHER)):
        conversations = iter(
            _conversation_ids([r for _, r in together if isinstance(r, Instruction | Chat)], tokenizer, prompt_on)
        )
        texts = iter(_text_ids([r.text for _, r in together if isinstance(r, Text) and r.text], tokenizer))
        for number, record in together:
            match record:
                case Window():
                    ids = _window_ids(record, number, tokenizer, max_length)
                    yield Row(input_ids=ids, labels=list(ids))
                case Text(""):
                    tally.empty += 1
                case Text() if pack:
                    stream += next(texts)
                    while len(stream) >= max_length:
                        yield Row(input_ids=stream[:max_length], labels=stream[:max_length])
                        stream = stream[max_length:]
                case Text():
                    ids = next(texts)
                    yield from _cut(Row(input_ids=ids, labels=list(ids)), max_length, tally)
                case _:
                    row = next(conversations)
                    if row is None:
                        tally.empty += 1
                    else:
                        yield from _cut(row, max_length, tally)
    if len(stream) > 1:
        yield Row(input_ids=stream, labels=list(stream))


def _cut(row: Row, max_length: int, tally: _Tally) -> Iterator[Row]:
    """The row at no more than `max_length`,
    or nothing if the cut leaves no label that a token before it could predict.
    """
    ids, labels = row["input_ids"], row["labels"]
    if len(ids) > max_length:
        tally.truncated += 1
        if all(label == IGNORED for label in labels[1:max_length]):
            tally.dropped += 1
            prompt = next(place for place, label in enumerate(labels) if label != IGNORED)
            tally.shortest_prompt = prompt if tally.shortest_prompt is None else min(prompt, tally.shortest_prompt)
            return
    yield Row(input_ids=ids[:max_length], labels=labels[:max_length])


def _conversation_ids(
    records: Sequence[Instruction | Chat], tokenizer: PreTrainedTokenizerBase, prompt_on: bool
) -> list[Row | None]:
    """Ids and labels of each record; None where every response is empty."""
    template = original_template(single_template(tokenizer))
    written: list[tuple[str, Spans] | None] = []
    for record in records:
        messages = _messages(record)
        if not any(turn.content for turn in messages if turn.role == "assistant"):
            written.append(None)
        elif template is None:
            written.append(transcript(messages, prompt_on, bos_text(tokenizer), eos_text(tokenizer)))
        else:
            written.append(templated_transcript(tokenizer, template, messages, prompt_on))
    present = [each for each in written if each is not None]
    labelled = iter(label_spans(tokenizer, [text for text, _ in present], [spans for _, spans in present]))
    rows = [None if each is None else next(labelled) for each in written]
    if template is None:
        _check_specials(rows, tokenizer)
    return rows


def _messages(record: Instruction | Chat) -> Sequence[Message]:
    if isinstance(record, Chat):
        return record.messages
    return (Message("user", user_turn(record.instruction, record.input)), Message("assistant", record.output))


def _check_specials(rows: Sequence[Row | None], tokenizer: PreTrainedTokenizerBase) -> None:
    """The special tokens are written into the text, so the tokenizer must read them back as what they are."""
    for row in rows:
        if row is not None and tokenizer.bos_token and row["input_ids"][0] != tokenizer.bos_token_id:
            raise DataError(
                f"the tokenizer does not read its own {tokenizer.bos_token!r} as id {tokenizer.bos_token_id}; add it as"
                " a special token"
            )
        if row is not None and tokenizer.eos_token_id not in row["labels"]:
            raise DataError(
                f"the tokenizer does not read its own {tokenizer.eos_token!r} as id {tokenizer.eos_token_id}; add it as"
                " a special token"
            )


def _text_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    begin = [int(tokenizer.bos_token_id)] if tokenizer.bos_token else []  # pyright: ignore[reportArgumentType]
    end = int(tokenizer.eos_token_id)  # pyright: ignore[reportArgumentType]
    return [[*begin, *ids, end] for ids in bare_ids(tokenizer, texts)]


def _window_ids(window: Window, number: int, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[int]:
    """A window's ids without the padding at its end, where the tokenizer has an id for padding and nothing else."""
    ids = list(window.input_ids)
    if len(ids) > max_length:
        raise DataError(
            f"window {number} holds {len(ids)} ids, max_length is {max_length}; ready windows are not cut, so raise"
            " max_length"
        )
    pad = tokenizer.pad_token_id
    if pad is None or pad in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id):
        return ids
    while ids and ids[-1] == pad:
        ids.pop()
    if len(ids) < 2:
        raise DataError(f"window {number} is padding (id {pad}) but for {len(ids)} ids; wanted at least 2 real ids")
    return ids


def _nothing_left(records: Records, n: int, max_length: int, prompt_on: bool, tally: _Tally) -> str:
    if tally.dropped and tally.shortest_prompt is not None:
        cure = "raise max_length" + (" or turn the collaborative prompt off" if prompt_on else "")
        lost = f"cut at max_length={max_length}, {tally.dropped} lost their whole response"
        lost += f" (the shortest prompt has {tally.shortest_prompt} tokens)"
        return f"{records.source}: nothing is left to learn in {n} records: {lost}; {cure}"
    return (
        f"{records.source}: nothing to learn in {n} records, {tally.empty} of them empty; give data with responses or"
        " text"
    )
