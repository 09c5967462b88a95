"""Expert slimming: stages that calibrate on stacked experts.

Oracle: the same experts as linears of their own, in a mixture that gives each its tokens; a sweep sees them as it sees
any linear, and has to come to the same weights.
"""

import copy
import logging
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from compresso.arch.base import arch_for
from compresso.arch.moe import MoeDecoder
from compresso.core.rounding import fit
from compresso.core.sparsity import lowest_in_groups, lowest_in_rows, lowest_share
from compresso.job import Job
from compresso.methods.gptq import Gptq
from compresso.methods.magnitude import Magnitude
from compresso.methods.sparsegpt import SparseGpt
from compresso.methods.wanda import Wanda
from compresso.sweep.calibration import Calibration
from compresso.sweep.shares import ShareAllocation, ShareSearch
from compresso.sweep.targets import Where
from tests.methods.conftest import MakeJob
from tests.methods.test_drop_experts import prepared, small

EXPERTS = Where(modules=("*.experts.*",))
STACKS = ("gate_up_proj", "down_proj")
NAMES = {"gate_up_proj": "first", "down_proj": "second"}


class Apart(nn.Module):
    """Experts as linears of their own."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.act_fn = experts.act_fn
        self.each = nn.ModuleList()
        for e in range(experts.num_experts):
            self.each.append(nn.ModuleDict())
            for name in STACKS:
                weight = getattr(experts, name)[e].detach().clone()
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                linear.weight = nn.Parameter(weight)
                self.each[e][NAMES[name]] = linear  # pyright: ignore[reportIndexIssue]

    def forward(self, states: Tensor, numbers: Tensor, weights: Tensor) -> Tensor:
        written = torch.zeros_like(states)
        for e, expert in enumerate(self.each):
            token, place = (numbers == e).nonzero(as_tuple=True)
            if len(token):
                linears = cast(nn.ModuleDict, expert)
                gate, up = linears["first"](states[token]).chunk(2, dim=-1)
                out = linears["second"](self.act_fn(gate) * up)
                written.index_add_(0, token, out * weights[token, place, None])
        return written


@dataclass(frozen=True)
class Described(MoeDecoder):
    """Knows the experts that are apart as linears."""

    def linear_groups(self, block: nn.Module) -> tuple[tuple[str, ...], ...]:
        each = cast(Apart, block.get_submodule("mlp.experts")).each
        names = tuple((f"mlp.experts.each.{e}.{NAMES[name]}",) for name in STACKS for e in range(len(each)))
        return (*MoeDecoder.linear_groups(self, block), *names)


def with_experts_apart(job: Job) -> Job:
    model = copy.deepcopy(job.model)
    for layer in model.model.layers:
        layer.mlp.experts = Apart(layer.mlp.experts)
    return replace(job, model=model, arch=Described("mixtral", width="intermediate_size", gives_scores=True))


def stacks(model: Any) -> dict[str, Tensor]:
    """Every expert's matrix, by layer, stack and number."""
    found: dict[str, Tensor] = {}
    for i, layer in enumerate(model.model.layers):
        for name in STACKS:
            experts = layer.mlp.experts
            of = (
                [linears[NAMES[name]].weight for linears in experts.each]
                if isinstance(experts, Apart)
                else getattr(experts, name)
            )
            found |= {f"{i}.{name}.{e}": weight.detach() for e, weight in enumerate(of)}
    return found


CASES: dict[str, Any] = {
    "wanda": Wanda(),
    "wanda 2:4": Wanda(pattern="2:4"),
    "wanda variant": Wanda(variant=True),
    "wanda by turns": Wanda(calibration=Calibration(true_sequential=True, batch=4)),
    "sparsegpt": SparseGpt(block=8),
    "sparsegpt 2:4": SparseGpt(pattern="2:4"),
    "gptq": Gptq(bits=4, group=8),
    "gptq in order": Gptq(bits=3, act_order=True),
    "magnitude": Magnitude(),
    "magnitude of all": Magnitude(scope="global"),
}


@pytest.mark.parametrize("name", CASES)
def test_experts_are_worked_on_as_linears_of_their_own(make_job: MakeJob, name: str) -> None:
    job = prepared(make_job())
    job.model.config._experts_implementation = "eager"
    dense, routers = (
        stacks(copy.deepcopy(job.model)),
        [layer.mlp.gate.weight.clone() for layer in job.model.model.layers],
    )
    apart = with_experts_apart(replace(job, out=job.out / "apart"))
    done, wanted = CASES[name](job), CASES[name](apart)
    mine, theirs = stacks(done.model), stacks(wanted.model)
    assert mine.keys() == theirs.keys() == dense.keys() and len(mine) == 2 * 2 * 8
    for key, weight in mine.items():
        assert torch.equal(weight == 0, theirs[key] == 0), key
        assert torch.allclose(weight, theirs[key], atol=1e-5), key
        assert not torch.equal(weight, dense[key])
    for layer, other, router in zip(done.model.model.layers, wanted.model.model.layers, routers, strict=True):
        assert torch.equal(layer.mlp.gate.weight, router)
        assert torch.allclose(layer.self_attn.o_proj.weight, other.self_attn.o_proj.weight, atol=1e-5)


@pytest.fixture
def starving(make_job: MakeJob) -> Job:
    """No token chooses experts 3 and 6 of the first layer."""
    job = prepared(make_job())
    with torch.no_grad():
        job.model.model.embed_tokens.weight[:, 0] = 0.5
        job.model.model.layers[0].self_attn.o_proj.weight[0] = 0
        job.model.model.layers[0].mlp.gate.weight[:, 0] = 0
        job.model.model.layers[0].mlp.gate.weight[[3, 6], 0] = -40
    return job


@pytest.mark.parametrize("name", ["wanda", "wanda 2:4", "sparsegpt", "sparsegpt 2:4", "gptq"])
def test_an_expert_that_no_token_chose_goes_by_magnitude_and_it_is_said(
    starving: Job, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    dense = {key: weight.clone() for key, weight in stacks(starving.model).items()}
    with caplog.at_level(logging.WARNING):
        done = replace(CASES[name], where=EXPERTS)(starving)
    after = stacks(done.model)
    for key in ("0.gate_up_proj.3", "0.down_proj.6"):
        before = dense[key]
        if name == "gptq":
            assert torch.allclose(after[key], fit(before, 4, group=8).round(before), atol=1e-6)
            continue
        gone = {
            "wanda": lambda weight: lowest_in_rows(weight, 0.5),
            "sparsegpt": lambda weight: torch.cat([lowest_share(part, 0.5) for part in weight.split(8, 1)], 1),
        }.get(name, lambda weight: lowest_in_groups(weight, 2, 4))(before.abs())
        assert torch.equal(after[key], before.masked_fill(gone, 0))
    told = done.records[name.split()[0]]["expert_tokens"]
    assert told["starved"] == {"model.layers.0.mlp.experts": [3, 6]}
    assert told["least"] == 0 < told["median"] <= told["most"] <= 36 * 12
    assert "no calibration token chose some experts (2), the first is 3 of model.layers.0.mlp.experts" in caplog.text


def test_tokens_of_experts_add_up_and_nothing_is_said_where_none_starves(
    make_job: MakeJob, caplog: pytest.LogCaptureFixture
) -> None:
    job = prepared(make_job(), small(num_local_experts=2))  # both of two are chosen by every token
    told = Wanda(where=EXPERTS)(job).records["wanda"]
    assert told["expert_tokens"] == {"least": 432, "median": 432, "most": 432, "starved": {}}
    assert not caplog.text and told["calibration_tokens"] == 432
    assert told["changed"] == 4 and not told["meant_but_unchanged"]
    assert told["sparsity"] == 0.5 and told["zeros"]["model.layers.1.mlp.experts.down_proj"] == "768/1536"


def test_what_was_kept_of_magnitude_is_larger_than_what_went(make_job: MakeJob) -> None:
    dense = stacks(prepared(make_job()).model)
    for key, weight in stacks(Magnitude(sparsity=0.4)(prepared(make_job())).model).items():
        gone = weight == 0
        assert dense[key][gone].abs().max() <= dense[key][~gone].abs().min()
        assert int(gone.sum()) == int(0.4 * weight.numel())


def test_shares_of_layers_with_experts_are_searched(make_job: MakeJob) -> None:
    search = ShareSearch(examples=8, batch=4, reach=0.2, step=0.1)
    done = Wanda(allocation=ShareAllocation.DP, search=search, where=EXPERTS)(prepared(make_job(), small(layers=3)))
    told = done.records["wanda"]
    assert told["sparsity"] == pytest.approx(0.5, abs=0.03) and len(told["shares"]) == 3
    for key, weight in stacks(done.model).items():
        share = told["shares"][key.partition(".")[0]]
        assert set((weight == 0).sum(1).tolist()) == {int(share * weight.shape[1] + 1e-9)}


def test_a_killed_sweep_goes_on_with_the_same_experts(make_job: MakeJob) -> None:
    """The second run finds a journal whose last block was torn off."""
    stage = Wanda(where=EXPERTS)
    whole = stacks(stage(prepared(make_job())).model)
    again = prepared(make_job())
    entries = sorted(again.out.parent.rglob("step-*"))
    assert len(entries) == 2
    (entries[1] / "weights.safetensors").write_bytes(b"torn")
    resumed = stage(again)
    assert all(torch.equal(weight, whole[key]) for key, weight in stacks(resumed.model).items())
    assert resumed.records["wanda"]["expert_tokens"]["most"] > 0


def test_a_stack_is_one_group_that_takes_its_turn(make_job: MakeJob) -> None:
    """So that a sweep by turns runs a block as often as a dense one does."""
    job = prepared(make_job())
    stage = Wanda(calibration=Calibration(true_sequential=True))
    (passes,) = [one for one in stage.work(job.model, arch_for(job.model.config)) if one.what == "calibration"]
    assert passes.forwards == (4 + 4 + 1) / 2  # q k v, o, gate_up, down; and the first block once more
