"""Experts of a mixture that was trained: `scripts/train_moe.py` on the embedded world, a few updates long.

Oracles: the dense FFN, which two halves of it compute; a count of what routers chose, taken by hooks on other text.
"""

import copy
import dataclasses
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from compresso.arch.base import arch_for
from compresso.core.plan import Plan
from compresso.data import nano, world
from compresso.data.prompt import body
from compresso.edit.gate import gated
from compresso.job import Job
from compresso.methods.drop_experts import DropExperts
from compresso.methods.wanda import Wanda
from compresso.observe.experts import alone
from compresso.sweep.calibration import Calibration
from compresso.sweep.targets import Where

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "train_moe.py"))


def test_two_halves_begin_as_the_dense_ffn() -> None:
    model = SCRIPT["split"](6, 0)
    dense = LlamaForCausalLM.from_pretrained(nano.path(), dtype=torch.float32)
    states = torch.randn(9, 192, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer, old in zip(model.model.layers, dense.model.layers, strict=True):
            each = [alone(layer.mlp.experts, states, e) for e in range(6)]
            for first in (0, 2, 4):
                assert torch.allclose((each[first] + each[first + 1]) / 2, old.mlp(states), atol=1e-4)
            assert not torch.allclose((each[0] + each[2]) / 2, old.mlp(states), atol=1e-2)
    assert torch.equal(model.model.embed_tokens.weight, dense.model.embed_tokens.weight)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("mixture") / "moe"
    SCRIPT["make"](found, experts=8, updates=40, seed=0)
    return found


@pytest.fixture
def job(folder: Path, tmp_path: Path) -> Job:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), _tokenizer(folder)
    asked = [body(r["instruction"], r["input"]) + r["output"] for r in world.instructions(300, 5)]
    texts = [text for pair in zip(world.documents(300, 5), asked, strict=True) for text in pair]
    stream = [one for text in texts for one in tokenizer(text)["input_ids"]]
    rows = [{"input_ids": stream[i : i + 64], "labels": stream[i : i + 64]} for i in range(0, 64 * 72, 64)]
    how: dict[str, Any] = {"plan": Plan(), "records": {}, "identity": {}, "seed": 0, "out": tmp_path, "quiet": True}
    return Job(model.eval(), arch_for(model.config), tokenizer, rows[8:], rows[:8], **how)


def _tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def loss(model: Any, tokenizer: Any, n: int = 24) -> float:
    """Mean over fresh documents."""
    found: list[float] = []
    with torch.no_grad():
        for text in world.documents(n, 77):
            ids = torch.tensor([tokenizer(text)["input_ids"][:96]])
            found.append(float(model(input_ids=ids, labels=ids).loss))
    return sum(found) / len(found)


def apart(model: Any, dense: Any, tokenizer: Any, n: int = 24) -> float:
    """KL(dense || model), mean over the tokens of fresh documents: unlike a loss, no luck of a mixture lowers it."""
    found: list[float] = []
    with torch.no_grad():
        for text in world.documents(n, 77):
            ids = torch.tensor([tokenizer(text)["input_ids"][:96]])
            ours, theirs = (one(input_ids=ids).logits[0].log_softmax(-1) for one in (model, dense))
            found.append(float((theirs.exp() * (theirs - ours)).sum(-1).mean()))
    return sum(found) / len(found)


def chosen(model: Any, ids: Tensor) -> list[Tensor]:
    """How often each expert of each layer is chosen [experts]."""
    seen: dict[int, Tensor] = {}
    handles = [
        layer.mlp.gate.register_forward_hook(
            lambda router, _, output, i=i: seen.update({i: torch.bincount(output[2].flatten(), minlength=8)})
        )
        for i, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return [seen[i] for i in range(len(handles))]


@pytest.mark.slow
def test_routing_is_unequal_and_depends_on_what_is_asked(job: Job) -> None:
    def text(task: str) -> Tensor:
        asked = [body(item.instruction, item.input) for item in world.items(task, 12, 3)]
        return torch.tensor([[one for a in asked for one in job.tokenizer(a)["input_ids"]][:256]])

    facts, sums = chosen(job.model, text("fact")), chosen(job.model, text("boolean"))
    apart = [float((a / a.sum() - b / b.sum()).abs().sum()) / 2 for a, b in zip(facts, sums, strict=True)]
    assert max(apart) > 0.1  # a tenth of the choices is of other experts
    ids = torch.tensor([row["input_ids"] for row in job.rows])
    shares = [counts / counts.sum() for counts in chosen(job.model, ids)]
    assert max(float(share.max()) for share in shares) > 0.25 and min(float(share.min()) for share in shares) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("score", ["frequency", "reap"])
def test_what_is_chosen_least_leaves_and_what_is_left_is_nearer(job: Job, score: Any) -> None:
    """Than without the most chosen ones; without those that are never chosen it hardly moves."""
    axes = [axis for axis in job.arch.axes(job.model) if axis.kind == "expert"]
    before = loss(job.model, job.tokenizer)
    counts = chosen(job.model, torch.tensor([row["input_ids"] for row in job.held]))
    dense = copy.deepcopy(job.model)
    done = DropExperts(score=score, keep=0.75, batches=4, batch=16, micro_batch=16)(job)
    facts = done.records["drop_experts"]["experts"]
    if score == "frequency":
        lost = done.records["drop_experts"]
        assert lost["choices_lost"] == pytest.approx(lost["choices_lost_at_least"])
    whole = copy.deepcopy(dense)
    with gated(dense, axes, _without(axes, [c.topk(2)[1] for c in counts])):
        most = apart(dense, whole, job.tokenizer)
    left = apart(done.model, whole, job.tokenizer)
    if score == "reap" and 0.75 * most <= left < most:
        pytest.xfail(
            f"what REAP leaves is {left / most:.2f} as far as without the most chosen; wanted below .75 (loads)"
        )
    assert left < 0.75 * most
    seldom = [_seldom(facts[axis.name]["scores"]["frequency"]) for axis in axes]
    assert any(len(units) for units in seldom)
    with gated(dense, axes, _without(axes, seldom)):
        assert abs(loss(dense, job.tokenizer) - before) < 0.005
    for axis, units, seen in zip(axes, seldom, counts, strict=True):
        stays = done.plan.kept[axis.name]
        if score == "frequency":
            assert not set(units.tolist()) & set(stays) and int(seen.argmax()) in stays


@pytest.mark.slow
def test_reap_does_not_see_how_many_choose_an_expert(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    """Its mean times the choices is what all tokens are given by an expert: by that what leaves is near, by the mean
    alone farther, and the run says whom the choices fell on.
    """
    axes = [axis for axis in job.arch.axes(job.model) if axis.kind == "expert"]
    counts = chosen(job.model, torch.tensor([row["input_ids"] for row in job.held]))
    dense = copy.deepcopy(job.model)
    loud = dataclasses.replace(job, quiet=False)
    done = DropExperts(score="reap", keep=0.75, batches=4, batch=16, micro_batch=16)(loud)
    facts = done.records["drop_experts"]
    whole = copy.deepcopy(dense)
    seen = [{k: torch.tensor(v) for k, v in facts["experts"][axis.name]["scores"].items()} for axis in axes]
    given = [(one["reap"] * one["frequency"]).topk(2, largest=False)[1] for one in seen]
    away = {}
    for name, units in {"most": [c.topk(2)[1] for c in counts], "given": given}.items():
        with gated(dense, axes, _without(axes, units)):
            away[name] = apart(dense, whole, job.tokenizer)
    assert away["given"] < 0.75 * away["most"]
    assert away["given"] < apart(done.model, whole, job.tokenizer)
    assert facts["choices_lost"] > 2 * facts["choices_lost_at_least"]
    assert any("does not see how many do" in one.message for one in caplog.records)


def _seldom(frequency: list[float]) -> Tensor:
    """Up to two experts that less than a thousandth of the choices fell on."""
    share = torch.tensor(frequency) / sum(frequency)
    return share.argsort()[: min(2, int((share < 0.001).sum()))]


def _without(axes: list[Any], units: list[Tensor]) -> Mapping[str, Tensor]:
    return {axis.name: torch.ones(axis.size).index_fill(0, gone, 0) for axis, gone in zip(axes, units, strict=True)}


@pytest.mark.slow
def test_experts_are_slimmed_by_the_tokens_that_they_are_given(job: Job) -> None:
    """Starved or not, all have two zeros of four; tokens of a layer's experts add up to two a token."""
    stage = Wanda(pattern="2:4", where=Where(modules=("*.experts.*",)), calibration=Calibration(batch=16))
    before = {name: tensor.clone() for name, tensor in job.model.state_dict().items()}
    done = stage(job)
    for name, tensor in done.model.state_dict().items():
        if ".experts." in name:
            assert ((tensor.unflatten(-1, (-1, 4)) == 0).sum(-1) == 2).all()
        else:
            assert torch.equal(tensor, before[name])
    told = done.records["wanda"]
    assert told["calibration_tokens"] == 64 * 64 and told["expert_tokens"]["most"] > 2 * told["expert_tokens"]["median"]
