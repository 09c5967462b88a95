"""Dynamic context pruning as a stage: the target is met by step gates, a larger weight leaves less live, a killed run
ends in the same gates, and the body stays frozen where it is asked to.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from compresso.edit.context_attention import keepers_of
from compresso.edit.context_gates import gates_of, live_fraction
from compresso.edit.context_layer_gates import LayerGates
from compresso.edit.patches import unpatch_
from compresso.errors import ArchError, Interrupted, RecipeError
from compresso.job import Job
from compresso.methods.context_gates import ContextGatesStage
from tests.methods.conftest import MakeJob

CONTRACT = {"gate_rank": 4, "alpha_start": 1.5, "landing": 4, "keep_context": 0.5}
QUICK: dict[str, Any] = {**CONTRACT, "steps": 6, "batch": 4, "micro_batch": 4, "lr": 1e-2}


def done(job: Job, **knobs: Any) -> Job:
    return ContextGatesStage(**{**QUICK, **knobs})(job)


def gates(job: Job) -> dict[str, Tensor]:
    return dict(job.patches[-1].tensors)


@torch.no_grad()
def live(job: Job) -> float:
    """Of step gates, on examples that no stage saw."""
    ids = torch.tensor([row["input_ids"] for row in job.held])
    job.model(ids, use_cache=False)
    found = live_fraction(job.model)
    assert found is not None
    return found


def test_the_target_is_met_by_the_gates_that_are_left(make_job: MakeJob) -> None:
    for target in (0.3, 0.7):
        job = done(make_job(folder=str(target)), train="gates", keep_context=target)
        facts = job.records["context_gates"]
        assert target <= facts["live_fraction"] < target + 0.1
        assert abs(live(job) - target) < 0.2
        assert len(facts["live_by_layer"]) == 3 and facts["rank"] == 4
        assert all(isinstance(one, LayerGates) and one.alpha == float("inf") for one in keepers_of(job.model))


@pytest.mark.slow
def test_a_larger_weight_leaves_less_live(make_job: MakeJob) -> None:
    shares = []
    for gamma in (0.0, 1.0, 20.0):
        how = {"steps": 40, "train": "gates", "keep_context": None, "gamma": gamma, "alpha_start": 1.5, "offset": 3.5}
        job = done(make_job(folder=str(gamma)), **how)
        shares.append(live(job))
        assert job.records["context_gates"]["live_fraction"] is None
    assert shares[0] > 0.9 and shares[0] > shares[1] > shares[2]


def test_scores_spread_as_asked_whatever_the_norms_are(make_job: MakeJob) -> None:
    found = []
    for scale in (1.0, 5.0):
        job = make_job(folder=str(scale))
        with torch.no_grad():
            for block in job.arch.blocks(job.model):
                block.input_layernorm.weight.mul_(scale)
        done(job, train="gates", steps=1, lr=0.0, spread=0.5, keep_context=None)
        (first, *_) = keepers_of(job.model)
        assert isinstance(first, LayerGates)
        ids = torch.tensor([job.rows[0]["input_ids"]])
        read = job.arch.blocks(job.model)[0].input_layernorm(job.model.get_input_embeddings()(ids))
        pairs = torch.ones(12, 12, dtype=torch.bool).tril(-1)
        found.append(first.raw(read)[0, 0][pairs])
        assert found[-1].std().item() == pytest.approx(0.5, rel=1e-4)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_gates_that_layers_judge_change_less_at_the_same_live_share(make_job: MakeJob) -> None:
    errors = []
    knobs = {"judged_by": "layers", "train": "gates", "alpha_even": True, "spread": 0.3, "landing": 8, "gamma": 0.0}
    for steps, lr in ((1, 0.0), (60, 1e-2)):
        job = done(make_job(folder=str(steps)), **{**knobs, "steps": steps, "lr": lr, "dual_rate": 1e-2})
        facts = job.records["context_gates"]
        assert 0.5 <= facts["live_fraction"] < 0.6
        ids = torch.tensor([row["input_ids"] for row in job.held])
        gates = gates_of(job.patches[-1], job.model)
        gates.hold_(job.model)
        with torch.no_grad(), gates.apart(job.model):
            job.model(ids, use_cache=False)
            errors.append(float(gates.error()))
    assert errors[1] < 0.8 * errors[0]


def test_offsets_have_a_rate_of_their_own(make_job: MakeJob) -> None:
    job = done(make_job(), train="gates", steps=1, lr=0.0, offset_lr=0.25, offset=1.0, keep_context=None, gamma=9.0)
    moved = (gates(job)["offsets"] - 1.0).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.25))


def test_gamma_rises_while_too_much_is_live(make_job: MakeJob) -> None:
    job = done(make_job(), train="gates", keep_context=0.2, gamma=0.0, dual_rate=0.1, offset=3.0)
    assert job.records["context_gates"]["gamma"] > 0.05
    fixed = done(make_job(folder="fixed"), train="gates", keep_context=None, gamma=0.3)
    assert fixed.records["context_gates"]["gamma"] == 0.3


@pytest.mark.parametrize("train", ["gates", "lora", "all"])
def test_what_learns_is_what_was_asked(train: str, make_job: MakeJob) -> None:
    job = make_job()
    before = {name: tensor.clone() for name, tensor in job.model.state_dict().items()}
    after = done(job, train=train)
    same = all(torch.equal(tensor, before[name]) for name, tensor in after.model.state_dict().items())
    assert same == (train == "gates")
    facts = after.records["context_gates"]
    own = 3 * (2 * 32 * 4 + 1)
    assert facts["trainable"] == own if train == "gates" else facts["trainable"] > own
    stage = ContextGatesStage(**{**QUICK, "train": train})
    assert stage.learning().own(job.model) == {"gates": own}  # pyright: ignore[reportOptionalCall]


@pytest.mark.slow
def test_killed_and_resumed_it_ends_in_the_same_gates(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    from compresso.training.context_objective import ContextObjective

    whole = gates(done(make_job(), train="gates", save_every=2))
    plain, calls = ContextObjective.ascend_, []

    def killing(self: ContextObjective) -> None:
        plain(self)
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(ContextObjective, "ascend_", killing)
    with pytest.raises(Interrupted):
        done(make_job(folder="cut"), train="gates", save_every=2)
    again = gates(done(make_job(folder="cut"), train="gates", save_every=2))
    assert len(calls) == 6
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_the_body_is_as_it_was_once_the_patch_is_off(make_job: MakeJob) -> None:
    job = make_job()
    ids = torch.tensor([row["input_ids"] for row in job.held])
    dense = job.model(ids).logits
    after = done(job, train="gates")
    assert not torch.allclose(after.model(ids, use_cache=False).logits, dense, atol=1e-3)
    unpatch_(after.model)
    torch.testing.assert_close(after.model(ids).logits, dense, rtol=0, atol=1e-5)


def test_bad_input_is_refused_before_training(make_job: MakeJob) -> None:
    job = make_job()
    with pytest.raises(RecipeError, match=r"keep_context=0\.05 of 12 tokens is less than one token; wanted at least"):
        ContextGatesStage(keep_context=0.05).check_data(job.rows, None, job.model.config, None)
    with pytest.raises(RecipeError, match=r"judged_by=layers, train=lora: layers are compared .* set train=gates"):
        ContextGatesStage(judged_by="layers", train="lora").check(job.model, job.arch)
    with pytest.raises(RecipeError, match=r"alpha_start=1, alpha_end=8: equal factors .* set alpha_even=false"):
        ContextGatesStage(alpha_even=True).check(job.model, job.arch)
    job.model.config.sliding_window = 4
    with pytest.raises(ArchError, match="sliding window"):
        ContextGatesStage().check(job.model, job.arch)
