"""The log survives its way to columns and back exactly."""

from hypothesis import given
from hypothesis import strategies as st

from compresso.training.history import History

ROWS = st.lists(
    st.dictionaries(st.sampled_from(["loss", "sparsity", "a/b"]), st.floats(allow_nan=False), min_size=1), max_size=6
)


@given(rows=ROWS, skipped=st.lists(st.integers(0, 99)))
def test_to_tensors_and_back(rows: list[dict[str, float]], skipped: list[int]):
    history = History([{"update": 2 * i, **row} for i, row in enumerate(rows)], skipped)
    assert History.from_tensors(history.to_tensors(), skipped) == history


def test_column():
    history = History([{"update": 0, "loss": 1.0}, {"update": 1, "loss": 2.0, "target": 0.5}])
    assert history.column("loss") == [1.0, 2.0] and history.column("target") == [0.5] and history.column("x") == []
