"""What stages say of spreading weights over processes (FSDP 2), and what they do."""

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import compresso
import compresso.stage.tuning
from compresso.errors import RecipeError
from compresso.methods.distill import Distill
from compresso.methods.learn_gates import LearnGates
from compresso.methods.lorashear import LoraShear
from compresso.methods.recover import Recover
from compresso.methods.sparse_finetune import SparseFinetune
from compresso.methods.svd import Svd
from compresso.methods.token_distill import TokenDistill
from compresso.stage import Learns
from tests.methods.conftest import MakeJob

SHORT: Mapping[str, Any] = {"batch": 4, "micro_batch": 4}
STAGES = {
    "lora": Recover(steps=2, **SHORT),
    "all": Recover(steps=2, train="all", **SHORT),
    "factors": Recover(steps=2, train="factors", **SHORT),
    "distill": Distill(steps=2, **SHORT),
    "distill cached": Distill(steps=2, teacher="cached", teacher_top=8, **SHORT),
    "token_distill": TokenDistill(steps=2, **SHORT),
    "learn_gates": LearnGates(keep=0.7, tune=1, ramp=2, hold=1, **SHORT),
    "lorashear": LoraShear(keep=0.7, tune=1, shrink=2, hold=1, **SHORT),
    "sparse_finetune": SparseFinetune(steps=2, **SHORT),
}


class Stopped(Exception):
    """What stands in the place of a training loop."""


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_spreads_what_its_plan_says_and_others_say_that_they_do_not(
    name: str, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given: dict[str, Any] = {}

    def fit(*_: Any, **how: Any) -> None:
        given.update(how)
        raise Stopped

    stage, job = STAGES[name], make_job()
    if name == "factors":
        job = Svd(keep=0.5)(job)
    if name == "sparse_finetune":
        job.model.get_parameter("model.layers.0.mlp.up_proj.weight").data[0] = 0
    monkeypatch.setattr(compresso.stage.tuning, "fit", fit)
    monkeypatch.setattr(compresso.stage.tuning, "sharding", lambda: True)
    with caplog.at_level(logging.WARNING), pytest.raises(Stopped):
        stage(job)
    assert isinstance(stage, Learns)
    assert (given["shards"] is not None) == stage.learning().spreads
    assert ("does not spread weights (FSDP)" in caplog.text) != stage.learning().spreads
    if given["shards"] is not None:
        n_taught = 3 if name in ("distill", "token_distill") else 0
        assert (len(given["shards"].blocks), len(given["shards"].beside)) == (3, n_taught)
        assert given["shards"].model is job.model


def test_a_batch_that_processes_cannot_share_is_refused_by_the_name_of_its_stage(tiny_folder: Path) -> None:
    recipe = {"stages": [{"magnitude_structured": {"keep": 0.9}}, {"recover": {"steps": 2, **SHORT}}]}
    with pytest.raises(RecipeError, match=r"stage 'recover': batch=4 cannot be split .* on 3 processes"):
        compresso.plan(copy.deepcopy(recipe), tiny_folder, device="3xh100")
