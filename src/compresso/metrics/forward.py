"""Logits of many sequences of different lengths, in batches whose make-up leaves the numbers as they are.

Sequences of like length share a batch and are padded on the right, where causal attention never looks from a real
token.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from compresso.arch.context import positions_of
from compresso.errors import DataError


def context_of(model: PreTrainedModel | PreTrainedConfig) -> int | None:
    """Tokens a model was made to read, as its config says; None if it does not say."""
    return positions_of(model.config if isinstance(model, PreTrainedModel) else model)


def check_ids(model: PreTrainedModel, windows: Sequence[Sequence[int]]) -> None:
    """Refuse ids that the model has no embedding for.

    Raises DataError.
    """
    rows = int(model.config.vocab_size)
    highest = max((max(window) for window in windows if window), default=0)
    if highest >= rows:
        raise DataError(
            f"token id {highest} is beyond the model's vocabulary of {rows}; give the tokenizer this model was trained"
            " with"
        )


def window_logits(
    model: PreTrainedModel, windows: Sequence[Sequence[int]], batch_size: int
) -> Iterator[tuple[int, Tensor]]:
    """The place of each window and its logits [tokens, vocab], longest windows first; an empty window has none.

    The model's mode is as before once the iterator is exhausted or closed.

    Raises:
        DataError: `batch_size` below 1, and ids that the model does not have.
    """
    if batch_size < 1:
        raise DataError(f"batch_size={batch_size}; wanted at least 1")
    check_ids(model, windows)
    order = sorted((i for i, window in enumerate(windows) if len(window)), key=lambda i: -len(windows[i]))
    was_training = model.training
    model.eval()
    try:
        for begin in range(0, len(order), batch_size):
            chosen = order[begin : begin + batch_size]
            longest = len(windows[chosen[0]])
            tokens = torch.zeros(len(chosen), longest, dtype=torch.long)
            mask = torch.zeros_like(tokens)
            for row, i in enumerate(chosen):
                tokens[row, : len(windows[i])] = torch.tensor(windows[i])
                mask[row, : len(windows[i])] = 1
            padded = {} if mask.all() else {"attention_mask": mask.to(model.device)}
            with torch.inference_mode():
                logits: Tensor = model(input_ids=tokens.to(model.device), use_cache=False, **padded).logits
            for row, i in enumerate(chosen):
                yield i, logits[row, : len(windows[i])]
    finally:
        model.train(was_training)
