"""The order of data: every epoch is a permutation, and a split of the work never changes what an update sees."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compresso.errors import CompressoError, DataError
from compresso.training.order import ShuffledBatches, micros_of


def batches(n: int, global_batch: int, seed: int = 0) -> ShuffledBatches:
    return ShuffledBatches(range(n), global_batch, lambda rows: {"x": torch.tensor(rows)}, seed)


def seen(source: ShuffledBatches, update: int) -> list[int]:
    return source.at(update, range(source.global_batch))["x"].tolist()


@given(n=st.integers(1, 30), global_batch=st.integers(1, 12), seed=st.integers(0, 5))
def test_every_epoch_sees_every_example_once(n: int, global_batch: int, seed: int):
    source = batches(n, global_batch, seed)
    stream = [x for update in range(3 * n // global_batch + 1) for x in seen(source, update)]
    for epoch in range(len(stream) // n):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


@given(processes=st.integers(1, 4), accumulation=st.integers(1, 4), size=st.integers(1, 3), update=st.integers(0, 9))
def test_processes_and_micro_batches_share_out_the_same_global_batch(
    processes: int, accumulation: int, size: int, update: int
):
    """N processes with A micro-batches see, slot by slot, what one process with N * A sees."""
    source = batches(17, processes * accumulation * size)
    alone = micros_of(update, source.global_batch, processes * accumulation, 0, 1)
    together = [
        m for rank in range(processes) for m in micros_of(update, source.global_batch, accumulation, rank, processes)
    ]
    assert sorted(together, key=lambda m: m.slot) == alone
    assert [row for m in alone for row in m.rows] == list(range(source.global_batch))
    assert [x for m in alone for x in source.at(update, m.rows)["x"].tolist()] == seen(source, update)


def test_slots_interleave_ranks():
    assert [m.slot for m in micros_of(0, 8, accumulation=2, rank=1, processes=4)] == [1, 5]


def test_epochs_and_seeds_differ():
    assert seen(batches(50, 50), 0) != seen(batches(50, 50), 1)
    assert seen(batches(50, 50, seed=1), 0) != seen(batches(50, 50, seed=2), 0)


def test_any_update_can_be_asked_for_in_any_order():
    source = batches(7, 3)
    forwards = [seen(source, update) for update in range(20)]
    assert [seen(source, update) for update in reversed(range(20))] == forwards[::-1]


def test_no_data_is_refused():
    with pytest.raises(DataError, match="0 examples"):
        batches(0, 2)
    with pytest.raises(DataError, match="global_batch=0"):
        batches(3, 0)


def test_a_batch_that_cannot_be_shared_out_is_refused():
    with pytest.raises(
        CompressoError, match="6 cannot be split over 2 processes x 2 micro-batches; choose a multiple of 4"
    ):
        micros_of(0, 6, 2, 0, 2)
    with pytest.raises(CompressoError, match="0 micro-batches"):
        micros_of(0, 6, 0, 0, 2)
