"""Whether the candidates of a search still write: a divergence on given text does not see that a model says one word
without end.
"""

import statistics
from collections.abc import Iterable, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.metrics.forward import context_of
from compresso.metrics.generation import samples

PROMPT_TOKENS = 16
"""Of a text that is to be continued."""


def repetition_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Sequence[int]], max_new_tokens: int
) -> float:
    """Mean share of repeated 4-grams in greedy continuations of some texts' beginnings, 0..1; see
    `compresso.metrics.generation.repetition`.

    Args:
        texts: ids of each; the first 16 of them, or half of them, are the prompt, and fewer where the context is short.
        max_new_tokens: of each continuation.

    Raises:
        DataError: as `samples`.
        NumericError: the model gives NaN.
    """
    room = (context_of(model) or PROMPT_TOKENS + max_new_tokens) - max_new_tokens
    prompts = [list(ids[: max(min(PROMPT_TOKENS, len(ids) // 2, room), 1)]) for ids in texts]
    written = samples(
        model, tokenizer, [str(i) for i in range(len(prompts))], max_new_tokens, lambda i: prompts[int(i)]
    )
    return statistics.fmean(one.repetition for one in written)


def first_that_writes(repetitions: Iterable[float], most: float) -> tuple[int, list[float]]:
    """The first candidate that repeats itself no more than `most`, or, if there is none, the one that does least.

    Args:
        repetitions: of the candidates, best first; no more of them are taken than needed.

    Returns:
        Its place, and the repetitions of those that were looked at.

    >>> first_that_writes(iter([0.6, 0.2, 0.1]), 0.3)
    (1, [0.6, 0.2])
    >>> first_that_writes([0.6, 0.5], 0.3)
    (1, [0.6, 0.5])
    """
    seen: list[float] = []
    for value in repetitions:
        seen.append(value)
        if value <= most:
            return len(seen) - 1, seen
    return seen.index(min(seen)), seen
