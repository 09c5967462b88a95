"""Shares that differ by layer: the total stays, the search is no worse than uniform, and killed ones go on."""

import itertools
import math
import random
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tests.methods.conftest import MakeJob
from tests.methods.conftest import make_job as make_job

from compresso.core.sparsity import count_of
from compresso.errors import RecipeError
from compresso.job import Job
from compresso.methods.magnitude import Magnitude
from compresso.methods.sparsegpt import SparseGpt
from compresso.methods.wanda import Wanda
from compresso.runner.recipe import build
from compresso.solve.evolve import Evolution
from compresso.sweep.candidates import CandidateDivergence
from compresso.sweep.shares import ShareAllocation, ShareSearch, in_blocks, in_matrix, in_rows, share_grid, zeros_at

SEARCH = ShareSearch(
    reach=0.25,
    step=0.125,
    examples=12,
    batch=4,
    evolution=Evolution(6, 6, (3,), growth=2),  # pyright: ignore[reportCallIssue]
)
STAGES = {"magnitude": Magnitude, "wanda": Wanda, "sparsegpt": SparseGpt}
CALIBRATED = {"wanda", "sparsegpt"}


def done(name: str, job: Job, **knobs: Any) -> Job:
    given = {"calibration": {"examples": 8}} if name in CALIBRATED else {}
    return STAGES[name](sparsity=0.5, search=SEARCH, **{**given, **knobs})(job)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("allocation", ["dp", "evolve"])
def test_the_total_stays_and_the_model_is_no_farther_from_dense(make_job: MakeJob, name: str, allocation: str) -> None:
    uniform = done(name, make_job()).records[name]
    job = make_job(folder="found")
    before = {key: value.clone() for key, value in job.model.state_dict().items()}
    found = done(name, job, allocation=allocation).records[name]
    assert found["sparsity"] == uniform["sparsity"] == 0.5
    shares = found["shares"]
    assert (
        len(shares) == 3 and sum(shares.values()) == pytest.approx(1.5) and set(shares.values()) <= set(found["grid"])
    )
    assert found["candidates"][-1] >= 1 and found["calibration"]["tokens"] == 12 * 12
    if allocation == "evolve":
        assert found["divergence"] <= found["divergence_uniform"]
    for key, value in job.model.state_dict().items():
        assert torch.equal(value, before[key]) == (key + "" not in {f"{one}.weight" for one in linears(job)})


def linears(job: Job) -> list[str]:
    return [
        name
        for name, module in job.model.named_modules()
        if "layers." in name and hasattr(module, "weight") and "norm" not in name
    ]


@pytest.mark.parametrize("name", STAGES)
def test_layers_that_lose_their_share_lose_that_many(make_job: MakeJob, name: str) -> None:
    job = done(name, make_job(), allocation="evolve")
    shares = job.records[name]["shares"]
    for linear in linears(job):
        weight = job.model.get_parameter(f"{linear}.weight")
        assert int((weight == 0).sum()) == pytest.approx(shares[linear.split(".")[2]] * weight.numel(), abs=1)


@pytest.mark.parametrize("name", STAGES)
def test_the_layer_that_does_least_loses_most(make_job: MakeJob, name: str) -> None:
    job = make_job()
    with torch.no_grad():
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            job.model.get_parameter(f"model.layers.1.{part}.weight").mul_(1e-3)
    shares = done(name, job, allocation="evolve").records[name]["shares"]
    assert shares["1"] == max(shares.values()) > 0.5 > min(shares.values())


class Killed(Exception):
    """Stands for a kill that nobody can catch."""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "places"), [("wanda", (0, 5, 20)), ("magnitude", (18,)), ("sparsegpt", (9,))])
def test_a_search_killed_at_any_candidate_goes_on_to_the_same_weights(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, name: str, places: tuple[int, ...]
) -> None:
    expected = done(name, make_job(folder="whole"), allocation="evolve")
    real, asked = CandidateDivergence.__call__, 0
    for place in places:

        def dying(self: CandidateDivergence, levels: Any, stage: int, /, place: int = place) -> float:
            nonlocal asked
            asked += 1
            if asked > place:
                raise Killed
            return real(self, levels, stage)

        asked = 0
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(CandidateDivergence, "__call__", dying)
            done(name, make_job(folder=f"{place}"), allocation="evolve")
        again = done(name, make_job(folder=f"{place}"), allocation="evolve")
        assert again.records == expected.records
        theirs = expected.model.state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in again.model.state_dict().items())


def test_damaged_levels_are_made_again(make_job: MakeJob) -> None:
    job = make_job()
    expected = done("wanda", job, allocation="dp").records
    files = sorted((job.out / "levels").iterdir())
    assert len(files) == 3
    files[1].write_bytes(files[1].read_bytes()[:100])
    files[2].unlink()
    again = make_job()
    assert done("wanda", again, allocation="dp").records["wanda"]["shares"] == expected["wanda"]["shares"]


@pytest.mark.parametrize("seed", range(40))
def test_steps_of_the_grid_are_whole_counts_in_all_sets(seed: int) -> None:
    draw = random.Random(seed)
    common = draw.choice([16, 24, 64, 96])
    shapes = [(draw.randint(1, 6) * common, draw.randint(1, 6) * common) for _ in range(3)]
    share = draw.choice([0.5, 0.6, 1 / 3, draw.random() * 0.8])
    for compared in (in_rows, in_matrix, in_blocks(draw.choice([7, 32, 128]))):
        sets = [[one for one in compared(*shape) if all(one)] for shape in shapes]
        assert [sum(n * size for n, size in of) for of in sets] == [math.prod(shape) for shape in shapes]
        sizes = [size for of in sets for _, size in of]
        grid = share_grid(share, sizes, 0.2, 0.1)
        assert share in grid and grid == sorted(grid) and all(0 <= one < 1 for one in grid)
        if compared is in_rows:
            steps = [[count_of(b, size) - count_of(a, size) for a, b in itertools.pairwise(grid)] for size in sizes]
            assert all(len(set(of)) == 1 for of in steps)
            assert all(zeros_at(grid[0], of) + zeros_at(grid[2], of) == 2 * zeros_at(grid[1], of) for of in sets)


def test_bad_knobs_are_named(make_job: MakeJob) -> None:
    for stage, knobs in (
        (Wanda, {"variant": True}),
        (SparseGpt, {"compat": "reference"}),
        (Magnitude, {"scope": "global"}),
    ):
        with pytest.raises(ValidationError, match="allocation=dp gives each layer"):
            stage(allocation="dp", **knobs)
    with pytest.raises(RecipeError, match=r"no share but 0\.5 is within reach"):
        Magnitude(allocation=ShareAllocation.DP, search=ShareSearch(reach=0.01, step=0.125))(make_job())
    with pytest.raises(ValidationError, match="steps"):
        Magnitude(search={"steps": 0.1})  # type: ignore[arg-type]


def test_magnitude_needs_data_for_a_search_alone() -> None:
    assert not build({"stages": [{"magnitude": {}}]}).needs("data")
    assert build({"stages": [{"magnitude": {"allocation": "evolve"}}]}).needs("data")
