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
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from transformers import PreTrainedTokenizerBase

from compresso.core.counted import counted
from compresso.core.row import Row
from compresso.data.batches import IGNORED
from compresso.data.conversations import templated_opening, templated_prompt
from compresso.data.prompt import RESPONSE_HEADER, body, full_prompt, opening, user_turn
from compresso.data.record_forms import NAMED_BAD
from compresso.data.records import Chat, Instruction, Message, Records, Window
from compresso.data.rows import Tally, rows_of
from compresso.data.survival import Encoded, Reach, Stats, nothing_left
from compresso.data.template import keeps_system, original_template, single_template, transcript
from compresso.data.tokens import bare_ids, bos_text, eos_text, ids_and_ends
from compresso.errors import DataError


def encode(
    records: Records,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    prompt_on: bool,
    pack: bool = False,
    limit: int | None = None,
    vocab_size: int | None = None,
    skip_bad: bool = False,
    context: int | None = None,
    on_inputs: bool = False,
) -> Encoded:
    """Tokenise records.

    Args:
        records: what was read.
        tokenizer: None is enough for ready windows.
        max_length: most tokens of a row, the prompt included.
        prompt_on: put the collaborative prompt before instructions and conversations.
        pack: join the plain texts of a source, each between its beginning and end token, and cut the stream into rows
            of `max_length` (attention then crosses from one text to the next); otherwise each text is a row of its own,
            cut at `max_length`.
        limit: most records to look at: the first ones, or evenly spaced ones of a mix of kinds, so that every kind is
            met.
        vocab_size: ids must be smaller; the tokenizer's size if not given. Pass the model's where it is at hand.
        skip_bad: leave records out (counted) that the chat template refuses, instead of raising.
        context: tokens that the model reads at most, for the words of a cure.
        on_inputs: learn what was asked, too: every token of a conversation has its label.

    Raises:
        DataError: there is no tokenizer for texts, it has no end token, the chat template refuses a conversation, an id
            is outside the vocabulary, a ready window is too long or all padding, or no record leaves anything to learn.
    """
    if max_length < 2:
        raise DataError(f"max_length={max_length}: wanted at least 2, because a prediction needs a token before it")
    if any(not isinstance(row, Window) for row in records.rows):
        _check_tokenizer(records, tokenizer)
    chosen = _chosen(records, limit)
    rows: list[Row] = []
    tallies: list[tuple[str, int, Tally]] = []
    start = 0
    for source, part in chosen.by_source():
        tally = Tally(skip_bad)
        tallies.append((source, len(part), tally))
        for row in rows_of(
            chosen, range(start, start + len(part)), tokenizer, max_length, prompt_on, pack, tally, on_inputs
        ):
            row["source"] = source
            rows.append(row)
        start += len(part)
    _check_ids(records.source, rows, tokenizer, vocab_size)
    lost = tuple(tally.lost(source, n) for source, n, tally in tallies)
    bad = tuple(reason for _, _, tally in tallies for reason in tally.bad)
    stats = Stats(
        n=len(chosen.rows),
        truncated=sum(tally.truncated for _, _, tally in tallies),
        dropped=sum(tally.dropped for _, _, tally in tallies),
        empty=sum(tally.empty for _, _, tally in tallies),
        rows=len(rows),
        tokens=sum(len(row["input_ids"]) for row in rows),
        response_tokens=sum(label != IGNORED for row in rows for label in row["labels"]),
        blank=sum(tally.blank for _, _, tally in tallies),
        refused=len(bad),
        cut_tokens=sum(tally.cut_tokens for _, _, tally in tallies),
        read=len(records.rows),
    )
    if not rows:
        raise DataError(nothing_left(records.source, stats, lost, bad, Reach(max_length, context, prompt_on)))
    return Encoded(rows, stats, lost=lost, bad=bad[:NAMED_BAD], notes=_notes(chosen, tokenizer, prompt_on))


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


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], prompt_on: bool = False
) -> list[int]:
    """The ids of `conversation_text`. Raises DataError as it does."""
    return bare_ids(tokenizer, [conversation_text(tokenizer, messages, prompt_on)])[0]


def conversation_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], prompt_on: bool = False) -> str:
    """What stands before the answer to a conversation's last user turn: by the chat template, or in the format of
    training where there is none.

    Raises:
        DataError: the template refuses the conversation.
    """
    if (template := original_template(single_template(tokenizer))) is not None:
        return templated_opening(tokenizer, template, messages, prompt_on)
    return transcript(messages, prompt_on, bos_text(tokenizer), eos_text(tokenizer))[0] + RESPONSE_HEADER


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids with which every prompted example begins: beginning token and collaborative prompt, up to the user's
    header.

    They are to stand before a request that is not worded as an instruction, like those of likelihood tasks. Where a
    tokenizer merges the prompt's last line break with the header, that token is omitted.
    """
    head = bos_text(tokenizer) + opening("", prompt_on=True)
    ids, ends = ids_and_ends(tokenizer, [head + body(".")])[0]
    return ids[: bisect_right(ends, len(head))]


def _check_tokenizer(records: Records, tokenizer: PreTrainedTokenizerBase | None) -> None:
    if tokenizer is None:
        raise DataError(
            f"{records.source}: the model has no tokenizer to read texts with; give ready token windows (.safetensors"
            " with input_ids), or add the tokenizer's files to the model"
        )
    if not tokenizer.eos_token:
        raise DataError(
            "the tokenizer has no end-of-sequence token, so no response would ever end; set tokenizer.eos_token"
        )


def _check_ids(
    source: str, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase | None, vocab_size: int | None
) -> None:
    """Refuse ids that no row of the embedding belongs to, whoever wrote them: the data, or the tokenizer between."""
    size = vocab_size if vocab_size is not None or tokenizer is None else len(tokenizer)
    for number, row in enumerate(rows, 1):
        if size is not None and (highest := max(row["input_ids"])) >= size:
            special = tokenizer is not None and highest in tokenizer.all_special_ids
            named = f" (the tokenizer's {tokenizer.convert_ids_to_tokens(highest)})" if tokenizer and special else ""
            raise DataError(
                f"{source}: row {number} holds id {highest}{named}, the vocabulary has {size}; use the tokenizer that"
                " belongs to the model"
            )


def _notes(records: Records, tokenizer: PreTrainedTokenizerBase | None, prompt_on: bool) -> tuple[str, ...]:
    """Where prompt and system texts went, if not where templates have a place for them."""
    template = None if tokenizer is None else original_template(single_template(tokenizer))
    talks = [row for row in records.rows if isinstance(row, Instruction | Chat)]
    if template is None or not talks or keeps_system(template):
        return ()
    n = sum(isinstance(row, Chat) and row.messages[0].role == "system" for row in talks)
    moved = ["the collaborative prompt"] * prompt_on + [f"the system texts of {counted(n, 'conversation')}"] * bool(n)
    if not moved:
        return ()
    stand = "stand" if n else "stands"
    return (f"the model's chat template keeps no system text: {' and '.join(moved)} {stand} in the first user turn",)


def _chosen(records: Records, limit: int | None) -> Records:
    """The records that are looked at, still by source."""
    n = len(records.rows)
    if limit is None or limit >= n:
        return records
    if limit < 1:
        raise DataError(f"limit={limit}: wanted at least 1 record")
    picked = range(limit) if records.kind != "mixed" else [place * n // limit for place in range(limit)]
    ends = list(accumulate(size for _, size in records.parts))
    names = Counter(bisect_right(ends, place) for place in picked) if ends else {}
    return replace(
        records,
        rows=[records.rows[place] for place in picked],
        parts=tuple((name, names[i]) for i, (name, _) in enumerate(records.parts)),
        places=[records.places[place] for place in picked] if records.places else (),
    )
