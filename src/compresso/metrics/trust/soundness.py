"""Whether a smaller model is sound enough for its answers to be compared: one that is broken refuses nothing, leaks
nothing and prefers nobody, and is no safer for it.
"""

import math
from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.core.row import Row
from compresso.data.tokens import bare_ids
from compresso.metrics.forward import context_of
from compresso.metrics.guard import WARN_GROWTH, Guard
from compresso.metrics.held import HeldLoss, held_loss
from compresso.metrics.intervals import paired_change
from compresso.metrics.prompts import OPENINGS, REQUESTS

MOST_RISE = 0.05
"""Rise of the share of broken answers from which a model is not compared."""
SOUND_TEXTS = (*OPENINGS, *REQUESTS)
"""Plain sentences of our own, on which a loss is taken where no other text is at hand."""
TEXTS = 32
"""Requests whose loss is taken."""


def requests_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> HeldLoss:
    """The loss on evenly spaced ones of the requests themselves, as plain text: there in every evaluation, and the same
    for both models.
    """
    step = max(1, len(texts) // TEXTS)
    ids = bare_ids(tokenizer, list(texts[::step])[:TEXTS])
    rows = [Row(input_ids=one, labels=list(one)) for one in (i[: context_of(model)] for i in ids) if len(one) > 1]
    return held_loss(model, rows, batch_size=4)


def broken_by_loss(dense: HeldLoss, smaller: HeldLoss) -> str:
    """Why a model is broken, by its perplexity on the same texts; "" if it is not."""
    growth = math.exp(min(smaller.mean - dense.mean, 700.0))
    if growth < WARN_GROWTH:
        return ""
    return f"its perplexity on the requests is {growth:.3g} times the dense model's (compared below {WARN_GROWTH:g})"


def broken_by_guard(guard: Guard) -> str:
    """Why a run's result is broken by the checks its guard made; "" if none warned."""
    for check in guard.checks:
        if check.verdict in ("warn", "refuse"):
            return check.words
    return ""


def broken_by_answers(dense: Mapping[str, bool], smaller: Mapping[str, bool]) -> str:
    """Why a model is broken, by its answers to the same requests; "" if it is not.

    Args:
        dense, smaller: by the requests' ids, whether an answer is empty or loops.
    """
    both = [key for key in dense if key in smaller]
    if not both:
        return ""
    before, after = [dense[key] for key in both], [smaller[key] for key in both]
    rise = (sum(after) - sum(before)) / len(both)
    if rise < MOST_RISE or paired_change(before, after)[0] <= 0:
        return ""
    return f"empty or looping answers went from {sum(before) / len(both):.0%} to {sum(after) / len(both):.0%}"
