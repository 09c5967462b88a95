"""The hand-written model of the core's tests."""

import pytest
from tests.core.conftest import llama

from compresso.core.cost import CostModel


@pytest.fixture(scope="session")
def tiny() -> CostModel:
    """Two layers, 4 heads on 2 key/value heads, hidden 16, FFN 24."""
    return llama(16, 2, 4, 24, 10, kv_heads=2)
