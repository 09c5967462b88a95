"""Wanda: scores of the outputs of the pruned blocks before, exact rows, nothing updated.

Oracle: masks of the authors' code, see `oracles`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from compresso.core.sparsity import lowest_in_rows, wanda_score
from compresso.errors import NumericError, RecipeError
from compresso.methods.wanda import Wanda
from compresso.sweep.calibration import Calibration
from compresso.sweep.targets import Where
from tests.methods.conftest import MakeJob
from tests.methods.oracles import check_masks, needs_oracles, oracle_job, perplexity


@needs_oracles
@pytest.mark.parametrize(("file", "pattern", "loss"), [("wanda50", None, 4.006053270), ("wanda24", "2:4", 4.012621740)])
@pytest.mark.parametrize("batch", [1, 5])
def test_the_authors_masks(tmp_path: Path, file: str, pattern: str | None, loss: float, batch: int) -> None:
    job = Wanda(pattern=pattern, calibration=Calibration(batch=batch))(oracle_job(tmp_path))
    check_masks(job, file)
    assert perplexity(job) == pytest.approx(loss, rel=1e-4)


def test_each_row_loses_its_share_and_what_stays_is_untouched(make_job: MakeJob) -> None:
    dense = dict(make_job().model.named_parameters())
    job = Wanda(sparsity=0.3)(make_job())
    for name, weight in job.model.named_parameters():
        gone = (weight == 0) & (dense[name] != 0)
        assert torch.equal(weight, dense[name].masked_fill(gone, 0))
        if name.endswith("proj.weight"):
            assert set(gone.sum(dim=1).tolist()) == {int(0.3 * weight.shape[1] + 1e-9)}
        else:
            assert not gone.any()
    facts = job.records["wanda"]
    assert facts["calibration_examples"] == 36
    assert facts["calibration_tokens"] == 36 * 12
    assert facts["changed"] == 21


def test_the_first_block_is_scored_on_its_own_inputs(make_job: MakeJob) -> None:
    job = make_job()
    ids = torch.tensor([row["input_ids"] for row in job.rows])
    inputs = job.model.model.layers[0].input_layernorm(job.model.model.embed_tokens(ids)).detach()
    weight = job.model.get_parameter("model.layers.0.self_attn.q_proj.weight").detach().clone()
    gone = lowest_in_rows(wanda_score(weight, inputs.reshape(-1, 32).square().sum(dim=0)), 0.5)
    assert torch.equal(Wanda()(job).model.get_parameter("model.layers.0.self_attn.q_proj.weight") == 0, gone)


def test_later_blocks_are_scored_on_what_pruned_ones_give_out(make_job: MakeJob) -> None:
    everything = Wanda(sparsity=0.7)(make_job()).model
    last_alone = Wanda(sparsity=0.7, where=Where(layers=(2, 3)))(make_job(folder="other")).model
    name = "model.layers.2.mlp.down_proj.weight"
    assert not torch.equal(everything.get_parameter(name), last_alone.get_parameter(name))


def test_attention_alone_leaves_every_other_tensor(make_job: MakeJob) -> None:
    dense = make_job().model.state_dict()
    job = Wanda(sparsity=0.2, where=Where(modules=("*.self_attn.*",)))(make_job())
    for name, tensor in job.model.state_dict().items():
        if "self_attn" in name:
            assert set((tensor == 0).sum(dim=1).tolist()) == {int(0.2 * tensor.shape[1])}
        else:
            assert torch.equal(tensor, dense[name])


def test_the_variant_meets_its_share_with_other_rows(make_job: MakeJob) -> None:
    job = Wanda(variant=True)(make_job())
    facts = job.records["wanda"]
    assert len(facts["alpha"]) == 21
    assert all(0 < alpha < 0.8 for alpha in facts["alpha"].values())
    assert facts["sparsity"] == pytest.approx(0.5, abs=0.01)
    rows = (job.model.get_parameter("model.layers.0.mlp.up_proj.weight") == 0).sum(dim=1)
    assert len(set(rows.tolist())) > 1


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"where": Where(ignore=("lm_heda",))}, "ignore: 'lm_heda' matches no linear"),
        ({"where": Where(modules=("lm_head",))}, "the head and the embeddings are never pruned"),
        ({"where": Where(ignore=("*",))}, "no linear is left to work on"),
        ({"where": Where(layers=(1, 4))}, "reaches past the model's 3 layers"),
        ({"pattern": "3:5"}, r"model\.layers\.0\.self_attn\.q_proj has 32 inputs, no multiple of 5"),
    ],
)
def test_what_cannot_be_chosen_is_refused_on_shapes(make_job: MakeJob, knobs: dict[str, Any], words: str) -> None:
    job = make_job()
    with pytest.raises(RecipeError, match=words):
        Wanda(**knobs).check(job.model, job.arch)


def test_the_head_may_be_named_among_the_ignored(make_job: MakeJob) -> None:
    dense = make_job(tied=False).model.lm_head.weight
    job = Wanda(where=Where(ignore=("lm_head", "*.down_proj")))(make_job(tied=False))
    assert torch.equal(job.model.lm_head.weight, dense)
    assert not [name for name in job.records["wanda"]["zeros"] if "down_proj" in name]


def test_an_overflow_is_named(make_job: MakeJob) -> None:
    job = make_job()
    job.model.get_parameter("model.layers.1.input_layernorm.weight").data *= float("inf")
    with pytest.raises(NumericError, match=r"model\.layers\.1\.self_attn\.q_proj reads NaN or Inf"):
        Wanda()(job)


def test_knobs_that_contradict_each_other() -> None:
    with pytest.raises(ValidationError, match="set sparsity to null and variant to false"):
        Wanda(pattern="2:4", variant=True)
    with pytest.raises(ValidationError, match="is empty; give"):
        Where(layers=(2, 2))
