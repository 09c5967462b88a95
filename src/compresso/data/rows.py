"""The rows of one source: windows as they are, texts between their beginning and end token, conversations written out
as one string; what was cut, empty or refused is tallied.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from transformers import PreTrainedTokenizerBase

from compresso.core.row import Row
from compresso.data.batches import IGNORED
from compresso.data.conversations import templated_transcript
from compresso.data.prompt import user_turn
from compresso.data.records import Chat, Instruction, Message, Records, Text, Window
from compresso.data.survival import Lost
from compresso.data.template import original_template, single_template, transcript
from compresso.data.tokens import Spans, bare_ids, bos_text, eos_text, label_spans
from compresso.errors import DataError

_TOGETHER = 512  # records tokenised in one call


@dataclass(slots=True)
class Tally:
    """What became of the records of a source."""

    skip_bad: bool = False
    truncated: int = 0
    cut_tokens: int = 0
    dropped: int = 0
    empty: int = 0
    blank: int = 0
    shortest_prompt: int | None = None
    bad: list[str] = field(default_factory=list[str])

    def lost(self, source: str, n: int) -> Lost:
        """The same, of a source of `n` records."""
        return Lost(source, n, self.dropped, self.empty - self.blank, len(self.bad), self.shortest_prompt)


def rows_of(
    records: Records,
    numbers: range,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    prompt_on: bool,
    pack: bool,
    tally: Tally,
    on_inputs: bool,
) -> Iterator[Row]:
    """Rows made of the records of these numbers, which are one source's."""
    stream: list[int] = []
    left = iter(numbers)
    while together := list(islice(left, _TOGETHER)):
        some = [(number, records.rows[number]) for number in together]
        spoken = [(records.place(number), r) for number, r in some if isinstance(r, Instruction | Chat)]
        conversations = iter(_conversation_ids(spoken, tokenizer, prompt_on, tally) if tokenizer and spoken else ())
        written = [r.text for _, r in some if isinstance(r, Text) and r.text]
        texts = iter(_text_ids(written, tokenizer) if tokenizer and written else ())
        for number, record in some:
            match record:
                case Window():
                    place = records.places[number] if records.places else f"window {number + 1}"
                    ids = _window_ids(record, place, tokenizer, max_length)
                    yield Row(input_ids=ids, labels=list(ids))
                case Text(""):
                    tally.empty += 1
                    tally.blank += 1
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
                    if row is not None and on_inputs:
                        row["labels"] = list(row["input_ids"])
                    if row is not None:
                        yield from _cut(row, max_length, tally)
    if len(stream) > 1:
        yield Row(input_ids=stream, labels=list(stream))


def _cut(row: Row, max_length: int, tally: Tally) -> Iterator[Row]:
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
        tally.cut_tokens += len(ids) - max_length
    yield Row(input_ids=ids[:max_length], labels=labels[:max_length])


def _conversation_ids(
    records: Sequence[tuple[str, Instruction | Chat]],
    tokenizer: PreTrainedTokenizerBase,
    prompt_on: bool,
    tally: Tally,
) -> list[Row | None]:
    """Ids and labels of each record; None where every response is empty, or the template refuses it and bad records are
    skipped.

    records: each with its place.
    """
    template = original_template(single_template(tokenizer))
    written: list[tuple[str, Spans] | None] = []
    for place, record in records:
        messages = _messages(record)
        if not any(turn.content for turn in messages if turn.role == "assistant"):
            tally.empty += 1
            written.append(None)
        elif template is None:
            written.append(transcript(messages, prompt_on, bos_text(tokenizer), eos_text(tokenizer)))
        else:
            try:
                written.append(templated_transcript(tokenizer, template, messages, prompt_on))
            except DataError as error:
                if not tally.skip_bad:
                    raise DataError(
                        f"{place}: {error}. Repair it, or give --skip-bad to skip and count such records."
                    ) from error
                tally.bad.append(f"{place}: {error}")
                written.append(None)
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


def _window_ids(window: Window, place: str, tokenizer: PreTrainedTokenizerBase | None, max_length: int) -> list[int]:
    """A window's ids without the padding at its end, where the tokenizer has an id for padding and nothing else."""
    ids = list(window.input_ids)
    if len(ids) > max_length:
        raise DataError(
            f"{place} holds {len(ids)} ids, max_length is {max_length}; ready windows are not cut, so"
            " raise max_length (--set data.max_length), or cut them"
        )
    pad = None if tokenizer is None else tokenizer.pad_token_id
    if tokenizer is None or pad in (None, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id):
        return ids
    while ids and ids[-1] == pad:
        ids.pop()
    if len(ids) < 2:
        raise DataError(f"{place} is padding (id {pad}) but for {len(ids)} ids; wanted at least 2 real ids")
    return ids
