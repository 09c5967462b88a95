"""The names that users may rely on, pinned: a change here is a change of the interface."""

import subprocess
import sys

import compresso

PUBLIC = ["Budget", "CostModel", "Plan", "Result", "allocate", "fit", "gated", "inspect", "load", "run", "shrink_"]


def test_public_names() -> None:
    assert sorted(compresso.__all__) == compresso.__all__ == PUBLIC
    assert all(hasattr(compresso, name) for name in PUBLIC)
    assert all(callable(getattr(compresso, name)) for name in PUBLIC)  # `run` is the function, not the module of that name


def test_importing_compresso_registers_its_models() -> None:
    code = "import compresso; from transformers import AutoConfig; print(AutoConfig.for_model('compresso_llama', head_dim=8).model_type)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "compresso_llama"
