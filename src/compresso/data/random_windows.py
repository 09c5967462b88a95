"""Windows of equal length out of training examples, for methods that are calibrated on plain text.

LLM-Pruner (arXiv 2305.11627, section 4.1) draws 10 samples of 64 tokens from BookCorpus: documents of at least that
length, each at most once, cut at a random place, all tokens predicted. Here the examples are those of the run.
"""

from collections.abc import Sequence

import torch

from compresso.core.row import Row
from compresso.errors import DataError


def random_windows(rows: Sequence[Row], examples: int, tokens: int, seed: int) -> list[Row]:
    """That many windows of `tokens` tokens from different examples, all labelled; a function of the seed alone.

    Raises:
        DataError: fewer examples than asked for are that long.
    """
    generator = torch.Generator().manual_seed(seed)
    long_enough = [row for row in rows if len(row["input_ids"]) >= tokens]
    if len(long_enough) < examples:
        raise DataError(
            f"{len(long_enough)} of {len(rows)} examples have the {tokens} tokens of a calibration window, wanted"
            f" {examples}; give longer text, or ask for shorter windows"
        )
    chosen: list[int] = torch.randperm(len(long_enough), generator=generator)[:examples].tolist()  # pyright: ignore
    windows: list[Row] = []
    for i in chosen:
        ids = long_enough[i]["input_ids"]
        start = int(torch.randint(len(ids) - tokens + 1, (), generator=generator))
        windows.append(Row(input_ids=ids[start : start + tokens], labels=ids[start : start + tokens]))
    return windows
