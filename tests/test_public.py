"""The names that users may rely on, pinned: a change here is a change of the interface."""

from transformers import AutoConfig

import compresso

PUBLIC = ["Budget", "CostModel", "Plan", "Result", "allocate", "fit", "gated", "inspect", "load", "run", "shrink_"]


def test_public_names() -> None:
    assert sorted(compresso.__all__) == compresso.__all__ == PUBLIC
    assert all(hasattr(compresso, name) for name in PUBLIC)
    assert all(
        callable(getattr(compresso, name)) for name in PUBLIC
    )  # `run` is the function, not the module of that name


def test_importing_compresso_registers_its_models() -> None:
    """In a fresh process tests/test_cli.py has a checkpoint reopened."""
    assert AutoConfig.for_model("compresso_llama", head_dim=8).model_type == "compresso_llama"
