"""Examples and tokenizer of a run in the numbering of a smaller vocabulary.

A removed token is re-tokenised with what stays, as the smaller tokenizer would; an example with one that cannot be
(there is no tokenizer, or only an unknown token is left) is dropped and counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from compresso.core.counted import counted
from compresso.core.row import Row
from compresso.data.batches import pad_id
from compresso.data.cut_tokenizer import cut, translation
from compresso.data.survival import MOST_DROPPED
from compresso.errors import DataError


@dataclass(frozen=True)
class Examples:
    """What a run reads.

    Args:
        tokenizer: None for ready token windows.
        rows, held: training and held-out examples.
        dense_held: the held-out ones in the dense model's tokens.
        pad_id: token that fills rows up.
        facts: what became of the examples, for records.
    """

    tokenizer: PreTrainedTokenizerBase | None
    rows: Sequence[Row]
    held: Sequence[Row]
    dense_held: Sequence[Row]
    pad_id: int
    facts: dict[str, object] = field(default_factory=dict[str, object])


def cut_examples(
    given: Examples, kept: Sequence[int], size: int, longest: int | None = None, allow_dropped: bool = True
) -> Examples:
    """The same examples with fewer tokens.

    Args:
        given: as they are; `dense_held` row by row beside `held`.
        kept: ids that stay, ascending.
        size: tokens before.
        longest: tokens that an example is cut to where it became longer.
        allow_dropped: go on where more examples are dropped than a run may lose.

    Raises:
        CheckpointError: the tokenizer cannot be cut like this.
        DataError: too many examples are dropped; none is left to train on, or none that was held out.
    """
    tokenizer = None if given.tokenizer is None else cut(given.tokenizer, kept, size)
    to = translation(given.tokenizer, tokenizer, kept)
    rows, n_rows_spelled = to.rows(given.rows, longest)
    held, n_held_spelled = to.rows(given.held, longest)
    pairs = [(new, old) for new, old in zip(held, given.dense_held, strict=True) if new is not None]
    trained = [row for row in rows if row is not None]
    for what, before, left in (("training", rows, trained), ("held-out", held, pairs)):
        if before and not left:
            raise DataError(
                f"all {len(before)} {what} examples hold tokens that left and have no spelling; keep more, or give"
                " more text"
            )
    if not allow_dropped and len(rows) - len(trained) > MOST_DROPPED * len(rows):
        raise DataError(
            f"{len(rows) - len(trained):,} of {counted(len(rows), 'training example')} hold tokens that left and"
            f" have no spelling, more than {MOST_DROPPED:.0%}; keep more, or give --allow-dropped"
        )
    if tokenizer is not None:
        padding = pad_id(tokenizer, len(kept))
    else:
        padding = list(kept).index(given.pad_id) if given.pad_id in set(kept) else 0
    facts: dict[str, object] = {
        "tokens": [len(kept), size],
        "examples_spelled_anew": {"training": n_rows_spelled, "held": n_held_spelled},
        "examples_dropped": {"training": len(rows) - len(trained), "held": len(held) - len(pairs)},
    }
    return Examples(tokenizer, trained, [new for new, _ in pairs], [old for _, old in pairs], padding, facts)
