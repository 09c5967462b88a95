"""Wanda on the attention alone, as arXiv 2401.10862 prunes: every row of it loses its share, the MLP not a bit, and a
share of nothing leaves every answer as it was.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compresso.data import nano
from compresso.metrics.trust.asking import Limits, ModelRespondent, Request
from compresso.runner.run import Result, run


def pruned(share: float, output: Path) -> Result:
    stage = {"sparsity": share, "where": {"modules": ["*.self_attn.*"]}, "calibration": {"examples": 4, "batch": 1}}
    recipe = {"stages": [{"wanda": stage}], "data": {"held": 2, "prompt": False, "limit": 12}}
    return run(recipe, nano.path(), "world", output=output, measure="none", quiet=True)


@pytest.mark.slow
def test_the_attention_loses_its_share_row_by_row_and_the_mlp_nothing(tmp_path: Path) -> None:
    dense = dict(AutoModelForCausalLM.from_pretrained(nano.path(), dtype=torch.float32).named_parameters())
    rows = 0
    for name, weight in pruned(0.2, tmp_path / "out").model.named_parameters():
        if "self_attn" in name and weight.ndim == 2:
            zeros = (weight == 0).sum(1) - (dense[name] == 0).sum(1)
            assert torch.equal(zeros, torch.full_like(zeros, int(0.2 * weight.shape[1]))), name
            rows += len(weight)
        else:
            assert torch.equal(weight, dense[name]), name
    assert rows > 0


@pytest.mark.slow
def test_a_share_of_nothing_leaves_the_answers(tmp_path: Path) -> None:
    """0.1 % of a row of a few hundred weights is none."""
    tokenizer = AutoTokenizer.from_pretrained(nano.path())
    requests = [Request(f"r{i}", f"What comes after {word}?") for i, word in enumerate(("Monday", "noon", "spring"))]
    models = (
        AutoModelForCausalLM.from_pretrained(nano.path(), dtype=torch.float32),
        pruned(0.001, tmp_path / "out").model,
    )
    before, after = (ModelRespondent(model, tokenizer).write(requests, Limits(16)) for model in models)
    assert before == after
