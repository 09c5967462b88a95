"""Encoders: data-free pruning works from Python and is written; a recipe's run refuses them in one line before weights
are read.
"""

import sys
from pathlib import Path

import pytest
import torch
from tests.arch.conftest import build

import compresso
from compresso.arch.base import arch_for
from compresso.core.plan import Plan
from compresso.errors import ArchError
from compresso.formats.hf import save_checkpoint
from compresso.job import Job
from compresso.methods.magnitude_structured import MagnitudeStructured


@pytest.mark.parametrize("name", ["bert", "bert_classifier", "vit"])
@pytest.mark.parametrize("kinds", [("head", "channel"), ("channel",)])
def test_magnitude_pruning(name: str, kinds: tuple[str, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build(name).eval()
    job = Job(
        model=model,
        arch=arch_for(model.config),
        tokenizer=None,
        rows=[],
        held=[],
        plan=Plan(),
        records={},
        identity={},
        seed=0,
        out=tmp_path / "work",
        quiet=True,
    )
    before = float(job.cost()().blocks)
    job = MagnitudeStructured(keep=0.75, kinds=kinds)(job)  # type: ignore[arg-type]
    shapes = job.arch.shapes(job.model)
    assert len(set(shapes)) == 1 and float(job.cost()().blocks) / before == pytest.approx(0.75, abs=0.05)
    if kinds == ("channel",):
        assert save_checkpoint(job.model, shapes, tmp_path / "out") == "uniform"
        assert compresso.inspect(tmp_path / "out")["parameters"]["total"] == job.model.num_parameters()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bert", r"\(bert\) is an encoder of texts and no causal language model; give a task that it can do: task="),
        ("vit", r"\(vit\) is no causal language model, it sees pictures; give task='image-classification'"),
    ],
)
def test_a_run_is_refused_before_weights_are_read(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name)
    save_checkpoint(model, arch_for(model.config).shapes(model), tmp_path / "model")
    monkeypatch.setattr(
        sys.modules["compresso.runner.first_job"], "load_model", lambda *_, **__: pytest.fail("weights were read")
    )
    with pytest.raises(ArchError, match=said) as caught:
        compresso.run(
            {"name": "prune-only", "stages": [{"magnitude_structured": {"keep": 0.7}}]},
            model=str(tmp_path / "model"),
            output=tmp_path / "out",
        )
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
