"""Calibration looks at each example once at most: the first epoch of the stream is read up to its end, and as much of
it as ever where there is more.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compresso.stage import Calibrates
from compresso.training.order import ShuffledBatches


def source(n: int, batch: int) -> ShuffledBatches:
    collate: Callable[[list[int]], dict[str, Tensor]] = lambda rows: {"x": torch.tensor(rows)}  # noqa: E731
    return ShuffledBatches(range(n), batch, collate, seed=3)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 11, 12, 13, 40])
@pytest.mark.parametrize(("batches", "batch", "micro_batch"), [(3, 4, 4), (3, 4, 3), (1, 12, 5), (12, 1, 1)])
def test_each_example_is_looked_at_once_at_most(n: int, batches: int, batch: int, micro_batch: int) -> None:
    looks, stream = Calibrates(batches, batch, micro_batch), source(n, batch)
    seen = [one["x"].tolist() for one in looks.read(stream)]
    flat = [i for part in seen for i in part]
    assert len(flat) == len(set(flat)) == looks.among(n) == min(12, n)
    assert flat == stream.indices(0, range(min(12, n)))
    assert all(0 < len(part) <= micro_batch for part in seen)


def test_where_all_are_there_the_batches_are_those_of_training() -> None:
    looks, stream = Calibrates(3, 4, 3), source(12, 4)
    cut = [stream.at(update, rows)["x"].tolist() for update in range(3) for rows in (range(3), range(3, 4))]
    assert [one["x"].tolist() for one in looks.read(stream)] == cut
