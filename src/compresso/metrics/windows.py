"""From texts to the windows a model reads: which tokens of them count, and how many bytes of text those stand for.

A token's bytes are the UTF-8 bytes of its text from the end of the token before it to its own end, as the tokenizer's
offsets tell; the last token of a text takes what remains of it. So the bytes of all tokens of a text are exactly its
bytes, whatever the tokenizer drops or splits, and of a character that is split over tokens the first one takes all
bytes. BOS and EOS have none: predicting them costs nats, but gives no text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from transformers import PreTrainedTokenizerBase

from compresso.metrics.protocol import PerplexityProtocol

_BETWEEN = {"blank line": "\n\n", "space": " "}


@dataclass(frozen=True, slots=True)
class Window:
    """Ids that are read at once, of which those from place `first` on are predicted; `n_bytes` of text, None if not
    known.
    """

    ids: list[int]
    first: int
    n_bytes: int | None

    @property
    def n_scored(self) -> int:
        """Predicted tokens."""
        return len(self.ids) - self.first


@dataclass(frozen=True, slots=True)
class Stream:
    """Ids in the order of the text, and the bytes of each (None where the tokenizer does not report them)."""

    ids: list[int]
    n_bytes: list[int] | None


def text_windows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], protocol: PerplexityProtocol
) -> list[Window]:
    """All windows of the texts in which a token is predicted, in order."""
    bos = cast("int | None", tokenizer.bos_token_id)
    head = [bos] if protocol.bos == "window" and bos is not None else []
    return [window for stream in streams(tokenizer, texts, protocol) for window in cut(stream, protocol, head)]


def streams(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], protocol: PerplexityProtocol) -> Iterator[Stream]:
    """The texts as token streams, joined as the protocol says."""
    if not texts:
        return
    between = _BETWEEN.get(protocol.joining)
    pieces = _pieces(
        tokenizer, texts if between is None else [between.join(texts)], specials=protocol.bos == "tokenizer"
    )
    bos = [] if tokenizer.bos_token_id is None else [cast(int, tokenizer.bos_token_id)]
    eos = [] if tokenizer.eos_token_id is None or not protocol.eos else [cast(int, tokenizer.eos_token_id)]
    pieces = [_with_ends(piece, bos if protocol.bos == "document" else [], eos) for piece in pieces]
    size = 1 if protocol.joining == "separate" else protocol.group or len(pieces)
    for begin in range(0, len(pieces), size):
        stream = _joined(pieces[begin : begin + size])
        yield _with_ends(stream, bos, []) if protocol.bos == "start" else stream


def cut(stream: Stream, protocol: PerplexityProtocol, head: list[int]) -> Iterator[Window]:
    """The windows of a stream, each with `head` before it.

    A token counts in the first window that holds it and something before it.
    """
    body = protocol.seq_len - len(head)
    stride = protocol.stride or body
    counted = 0
    for number, begin in enumerate(range(0, len(stream.ids), stride)):
        end = min(begin + body, len(stream.ids))
        if number == protocol.max_windows or (end - begin < body and protocol.remainder == "dropped"):
            return
        first = max(counted, begin + (not head))
        if first < end:
            n_bytes = None if stream.n_bytes is None else sum(stream.n_bytes[first:end])
            yield Window(head + stream.ids[begin:end], first - begin + len(head), n_bytes)
        counted = end
        if end == len(stream.ids):
            return


def _pieces(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], specials: bool) -> list[Stream]:
    """Each text tokenised by itself."""
    known = bool(tokenizer.is_fast)
    out = tokenizer(list(texts), add_special_tokens=specials, return_offsets_mapping=known, verbose=False)
    ids = cast("list[list[int]]", out["input_ids"])
    if not known:
        return [Stream(list(of_text), None) for of_text in ids]
    offsets = cast("list[list[tuple[int, int]]]", out["offset_mapping"])
    return [
        Stream(list(a), bytes_of_tokens(text, [end for _, end in b]))
        for text, a, b in zip(texts, ids, offsets, strict=True)
    ]


def bytes_of_tokens(text: str, ends: Sequence[int]) -> list[int]:
    """The UTF-8 bytes of each token of a text, from the character after its last; a special token ends at 0."""
    points = torch.frombuffer(bytearray(text.encode("utf-32-le") or bytes(4)), dtype=torch.int32)[: len(text)]
    widths = 1 + (points >= 0x80).long() + (points >= 0x800).long() + (points >= 0x10000).long()
    before = [0, *widths.cumsum(0).tolist()]
    reached = [0]
    for end in ends:
        reached.append(max(reached[-1], before[end]))
    if ends:
        reached[-1] = before[-1]
    return [b - a for a, b in pairwise(reached)]


def _with_ends(piece: Stream, bos: list[int], eos: list[int]) -> Stream:
    n_bytes = None if piece.n_bytes is None else [*(0 for _ in bos), *piece.n_bytes, *(0 for _ in eos)]
    return Stream([*bos, *piece.ids, *eos], n_bytes)


def _joined(pieces: Sequence[Stream]) -> Stream:
    known = all(piece.n_bytes is not None for piece in pieces)
    return Stream(
        [i for piece in pieces for i in piece.ids],
        [n for piece in pieces for n in piece.n_bytes or ()] if known else None,
    )
