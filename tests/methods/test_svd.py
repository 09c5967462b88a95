"""Low rank on whole models. Its mathematics is tested in tests/core/test_low_rank.py."""

import copy
import shutil

import pytest
import torch
from torch import Tensor, nn

from compresso.core.low_rank import most_rank, rank_within, root_of, truncated
from compresso.errors import NumericError, RecipeError
from compresso.job import Job
from compresso.methods.svd import Moments, Svd, Whiten
from compresso.observe.folds import Stats
from compresso.sweep.calibration import Calibration
from compresso.sweep.low_rank import of_low_rank, ranks_of
from compresso.sweep.targets import Group, Where
from tests.methods.conftest import MakeJob


def linears(job: Job) -> dict[str, Tensor]:
    return {
        name: one.weight.detach()
        for name, one in job.model.named_modules()
        if isinstance(one, nn.Linear) and "layers" in name
    }


@pytest.mark.parametrize("whiten", Whiten)
def test_every_linear_gets_the_rank_that_the_records_say_and_no_more_numbers_than_asked(
    make_job: MakeJob, whiten: Whiten
) -> None:
    job = Svd(keep=0.6, whiten=whiten)(make_job())
    facts = job.records["svd"]
    found = linears(job)
    assert facts["ranks"].keys() == found.keys() == facts["error"].keys()
    numbers = 0
    for name, weight in found.items():
        rank = facts["ranks"][name]
        assert rank == rank_within(torch.linalg.svdvals(weight.double()), torch.finfo(torch.float32).eps)
        assert rank < most_rank(*weight.shape)
        numbers += rank * sum(weight.shape)
    assert facts["weights"] == sum(weight.numel() for weight in found.values())
    assert facts["factored"] == numbers <= 0.6 * facts["weights"]
    assert facts["meant_but_unchanged"] == [] and facts["changed"] == len(found)


def test_the_recorded_error_is_the_share_of_the_outputs_and_whitening_loses_less() -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(50, 16, generator=generator) * torch.randn(16, generator=generator).exp()
    dense = nn.ModuleDict({name: nn.Linear(16, out, bias=False) for name, out in (("one", 12), ("other", 20))})
    dense.requires_grad_(False)
    errors: dict[bool, dict[str, float]] = {}
    for whiten in (False, True):
        model = copy.deepcopy(dense)
        edit = of_low_rank(model, {"one": 3, "other": 4}, whiten, 1e-6)
        notes = edit(Group(0, ("one", "other")), Stats(inputs.T @ inputs, len(inputs)))
        errors[whiten] = {name: facts["error"] for name, facts in notes.items()}
        for name in ("one", "other"):
            before, after = (one.get_submodule(name)(inputs) for one in (dense, model))
            share = float((after - before).square().sum() / before.square().sum())
            assert errors[whiten][name] == pytest.approx(share, rel=1e-4)
    assert all(errors[True][name] < 0.9 * errors[False][name] for name in ("one", "other"))


def test_a_second_moment_without_a_root_stops_the_run_by_name() -> None:
    model = nn.ModuleDict({"one": nn.Linear(4, 6, bias=False)}).requires_grad_(False)
    edit = of_low_rank(model, {"one": 2}, True, 1e-6)
    with pytest.raises(NumericError, match=r"one: .* set whiten to none"):
        edit(Group(0, ("one",)), Stats(torch.zeros(4, 4), 5))


def test_plain_truncation_looks_at_nothing_but_the_matrix(make_job: MakeJob) -> None:
    many, few = (
        Svd(whiten=Whiten.NONE, calibration=Calibration(examples=examples))(make_job(folder=str(examples)))
        for examples in (30, 2)
    )
    assert all(
        torch.equal(one, other) for one, other in zip(linears(many).values(), linears(few).values(), strict=True)
    )
    assert many.records["svd"]["damped_more"] == {}


def test_whitening_follows_the_blocks_already_truncated_and_reaches_what_it_is_told_to(make_job: MakeJob) -> None:
    dense, job = make_job(), Svd(keep=0.5, where=Where(modules=("*.mlp.*",), layers=(1, 3)))(make_job(folder="part"))
    before, after = linears(dense), linears(job)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert (
        changed
        == job.records["svd"]["ranks"].keys()
        == {name for name in before if ".mlp." in name} - {name for name in before if "layers.0." in name}
    )


def test_stopped_after_any_block_it_goes_on_to_the_same_weights(make_job: MakeJob) -> None:
    whole = Svd(keep=0.6)(make_job(folder="whole"))
    steps = sorted(path.name for path in whole.out.iterdir())
    assert steps == [f"step-{layer:06d}" for layer in range(3)]
    for done in (1, 2):
        stopped = make_job(folder=f"stopped after {done}")
        shutil.copytree(whole.out, stopped.out)
        for name in steps[done:]:
            shutil.rmtree(stopped.out / name)
        resumed = Svd(keep=0.6)(stopped)
        assert resumed.records == whole.records
        assert all(torch.equal(one, linears(whole)[name]) for name, one in linears(resumed).items())


def test_a_matrix_that_no_rank_makes_smaller_is_refused_before_weights_are_read(make_job: MakeJob) -> None:
    job = make_job()
    with pytest.raises(RecipeError, match=r"q_proj is 64 by 32: not even rank 1 has keep=0.01 of its numbers"):
        Svd(keep=0.01).check(job.model, job.arch)
    groups = Svd(keep=0.9).check(job.model, job.arch)
    for name, rank in ranks_of(job.model, groups, 0.9).items():
        rows, columns = linears(job)[name].shape
        assert rank * (rows + columns) <= 0.9 * rows * columns < (rank + 1) * (rows + columns)


def read_by(model: nn.Module, name: str, rows: Tensor) -> Tensor:
    """What a linear reads [tokens, in], float64."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        model(input_ids=rows)
    handle.remove()
    return seen[0].flatten(0, -2).double()


@pytest.mark.parametrize("moments", [Moments.DENSE, Moments.UPDATED])
def test_whitened_by_the_dense_model_and_fitted_behind_the_truncated_blocks(
    make_job: MakeJob, moments: Moments
) -> None:
    """The oracle runs whole models, dense and truncated up to the last layer, and fits to tokens and outputs."""
    dense = make_job(folder="dense").model
    job = Svd(keep=0.6, moments=moments, damping=1e-8)(make_job())
    rows = torch.tensor([row["input_ids"] for row in job.rows])
    before = copy.deepcopy(job.model)
    before.model.layers[2] = copy.deepcopy(dense.model.layers[2])
    for name in ("model.layers.2.self_attn.q_proj", "model.layers.2.mlp.down_proj"):
        weight = dense.get_submodule(name).weight.detach().double()
        inputs, given = read_by(dense, name, rows), read_by(before, name, rows)
        found = truncated(weight, job.records["svd"]["ranks"][name], root_of(inputs.T @ inputs, 1e-8).lower)
        left = found.left
        if moments == Moments.UPDATED:
            left = torch.linalg.lstsq(given @ found.right.T, given @ weight.T).solution.T
        made = job.model.get_submodule(name).weight.detach().double()
        torch.testing.assert_close(given @ made.T, given @ (left @ found.right).T, atol=2e-3, rtol=0)
        share = (given @ (made - weight).T).square().sum() / (given @ weight.T).square().sum()
        assert job.records["svd"]["error"][name] == pytest.approx(float(share), rel=1e-3)


def test_the_update_loses_less_than_the_dense_whitening_and_only_behind_truncated_blocks(make_job: MakeJob) -> None:
    errors = {
        moments: Svd(keep=0.5, moments=moments)(make_job(folder=str(moments))).records["svd"]["error"]
        for moments in Moments
    }
    for name, updated in errors[Moments.UPDATED].items():
        if ".layers.0." in name:
            assert updated == pytest.approx(errors[Moments.DENSE][name], rel=1e-3)
            assert updated == pytest.approx(errors[Moments.COMPRESSED][name], rel=1e-3)
        else:
            assert updated <= errors[Moments.DENSE][name] * (1 + 1e-6)
    last = [sum(found[name] for name in found if ".layers.2." in name) for found in errors.values()]
    assert last[2] < 0.999 * last[1]


def test_moments_without_whitening_are_refused() -> None:
    with pytest.raises(ValueError, match="moments: dense are for whitening, and whiten is none"):
        Svd(whiten=Whiten.NONE, moments=Moments.DENSE)
