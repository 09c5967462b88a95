"""What `benchmarks/sparse_speed.py` times are the same products: linears with zeros as rows of what is not 0, by torch
and by scipy, are the dense ones to 1e-6 of their norm.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from compresso.core.sparsity import lowest_share

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import sparse_speed  # pyright: ignore[reportMissingImports]

    yield sparse_speed
    for name in ("sparse_speed", "engines", "common"):
        if name not in before:
            sys.modules.pop(name, None)


def linears(share: float) -> list[torch.Tensor]:
    """A wide, a tall and a square one without the smallest share of their weights."""
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(*shape, generator=generator) for shape in ((48, 96), (96, 40), (64, 64))]
    return [weight.masked_fill(lowest_share(weight.abs(), share), 0) for weight in found]


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("share", [0.0, 0.7, 0.95])
def test_products_over_what_is_not_0_are_the_dense_ones(bench: ModuleType, tokens: int, share: float) -> None:
    rows = bench.products(linears(share), tokens, 1)
    assert [one["variant"] for one in rows] == ["dense", "dense, by numpy", "torch CSR", "scipy CSR"]
    assert all(one["difference"] <= 1e-6 for one in rows)


def test_another_product_is_noticed(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bench.csr_array
    monkeypatch.setattr(bench, "csr_array", lambda weight: whole(1.001 * weight))
    with pytest.raises(AssertionError, match=r"scipy CSR: .* of its norm from dense"):
        bench.products(linears(0.7), 1, 1)
