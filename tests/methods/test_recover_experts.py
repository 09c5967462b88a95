"""What learns of a mixture of experts: adapters on experts, attention and routers; routers alone; everything.

Oracles: parameters that a knob does not name stay bit by bit; an adapter of a stack does what one linear's adapter does
to each expert; a taught router comes nearer to its teacher.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compresso.edit.lora import adapter_parameters, attach_, merge_
from compresso.errors import NumericError, RecipeError
from compresso.formats.hf import save_checkpoint
from compresso.job import Job
from compresso.methods.distill import Distill
from compresso.methods.drop_experts import DropExperts
from compresso.methods.recover import Recover
from compresso.metrics.held import held_loss
from tests.methods.conftest import MakeJob
from tests.methods.test_awq_experts import FAMILIES
from tests.methods.test_drop_experts import LOOKS, logits, prepared

QUICK: dict[str, Any] = {"steps": 3, "batch": 4, "micro_batch": 4, "lr": 1e-2}
ROUTERS = {"mixtral": "mlp.gate", "qwen2_moe": "mlp.gate", "gpt_oss": "mlp.router"}


def mixture(job: Job, name: str) -> Job:
    job = prepared(job, FAMILIES[name]())
    dense = copy.deepcopy(job.model)
    return replace(job, original=lambda dtype, device: copy.deepcopy(dense).to(device, dtype))


def moved(job: Job, stage: Any) -> tuple[set[str], Job]:
    """Which parameters a stage changed, without "model.layers.N."."""
    before = {name: p.detach().clone() for name, p in job.model.named_parameters()}
    done = stage(job)
    names = {name for name, p in done.model.named_parameters() if not torch.equal(p, before[name])}
    return {name.split(".", 3)[-1] for name in names}, done


@pytest.mark.parametrize("name", ROUTERS)
def test_adapters_move_what_targets_name_and_no_more(make_job: MakeJob, name: str, tmp_path: Path) -> None:
    targets = ("q_proj", "up_proj", "down_proj", "router")
    names, done = moved(mixture(make_job(), name), Recover(targets=targets, **QUICK))
    wanted = {"self_attn.q_proj.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj", f"{ROUTERS[name]}.weight"}
    shared = {f"mlp.shared_expert.{one}.weight" for one in ("up_proj", "down_proj")} if name == "qwen2_moe" else set()
    assert names == wanted | shared
    assert not any("lora" in one or "base_layer" in one for one, _ in done.model.named_parameters())
    save_checkpoint(done.model, done.arch.shapes(done.model), tmp_path / "made")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(opened), logits(done.model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stage", [Recover, Distill])
def test_routers_alone_move_with_train_router(make_job: MakeJob, stage: Any) -> None:
    job = mixture(make_job(), "gpt_oss")
    names, done = moved(job, stage(train="router", **QUICK))
    assert names == {"mlp.router.weight", "mlp.router.bias"}
    numbers = sum(p.numel() for n, p in done.model.named_parameters() if ".router." in n)
    assert done.records["recover" if stage is Recover else "distill"]["trainable"] == numbers
    says = stage(train="router").learning()
    assert says.own is not None and says.own(done.model) == {"router": numbers} and says.frozen


def test_a_taught_router_comes_nearer_to_its_teacher(make_job: MakeJob) -> None:
    dropped = DropExperts(keep=0.5, score="frequency", **LOOKS)(mixture(make_job(), "mixtral"))
    assert dropped.original is not None
    teacher = dropped.original(torch.float32, torch.device("cpu"))
    ids = torch.tensor([row["input_ids"] for row in dropped.held])

    def far(model: Any) -> float:
        with torch.no_grad():
            p, q = (torch.log_softmax(one(input_ids=ids).logits, -1) for one in (teacher, model))
        return float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean"))

    before = far(dropped.model)
    done = Distill(train="router", steps=40, batch=8, micro_batch=8, lr=2e-2)(dropped)
    assert far(done.model) < before - 0.01 * before


@pytest.mark.parametrize("train", ["lora", "all"])
def test_a_damaged_mixture_recovers(make_job: MakeJob, train: Any) -> None:
    """With adapters on everything, the default, and with all weights."""
    damaged = DropExperts(keep=0.5, score="frequency", **LOOKS)(mixture(make_job(), "mixtral"))
    before = held_loss(damaged.model, damaged.held).mean
    names, done = moved(damaged, Recover(train=train, steps=30, batch=8, micro_batch=8, lr=1e-2))
    assert held_loss(done.model, done.held).mean < before - 0.3
    assert "mlp.experts.gate_up_proj" in names and ("mlp.gate.weight" in names) == (train == "all")


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_an_adapter_of_a_stack_is_one_of_each_expert(make_job: MakeJob, name: str) -> None:
    """Its merged update is alpha / rank B_e A_e, and the adapted model computes what the merged one does."""
    model = mixture(make_job(), name).model
    before = model.model.layers[1].mlp.experts.down_proj.detach().clone()
    adapted = attach_(model, 2, 6.0, ("down_proj", "router"), seed=3)
    generator = torch.Generator().manual_seed(0)
    factors: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for own, parameter in adapted.named_parameters():
            if "lora_B" in own:
                parameter.normal_(0, 0.1, generator=generator)
            if "layers.1.mlp.experts" in own and "lora_" in own:
                factors["A" if "lora_A" in own else "B"] = parameter.clone()
        wanted = logits(adapted)
    merged = merge_(adapted)
    torch.testing.assert_close(logits(merged), wanted, atol=1e-4, rtol=1e-4)
    update = merged.get_submodule("model.layers.1.mlp.experts").get_parameter("down_proj") - before
    experts = len(before)
    for e in (0, experts - 1):
        a, b = factors["A"].reshape(experts, 2, -1)[e], factors["B"][:, e::experts]
        one = 3 * b @ a
        torch.testing.assert_close(update[e], one.T if name == "gpt_oss" else one, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        again = attach_(merged, 2, 6.0, ("down_proj",))
        next(p for n, p in again.named_parameters() if "lora_B" in n).fill_(torch.inf)
    with pytest.raises(NumericError, match=r"merging adapters makes .*experts.* NaN or Inf"):
        merge_(again)


def test_what_cannot_learn_is_said(make_job: MakeJob) -> None:
    job = mixture(make_job(), "mixtral")
    with pytest.raises(RecipeError, match=r"dropout=0.1 lies in front of linears, and mlp.experts.gate_up_proj is"):
        attach_(job.model, 2, 4.0, ("up_proj",), dropout=0.1)
    with pytest.raises(RecipeError, match=r"experts.down_proj is no linear, whose units could be scored by adapters"):
        adapter_parameters(attach_(job.model, 2, 4.0, ("down_proj",)))
    dense = make_job(folder="dense")
    with pytest.raises(RecipeError, match=r"no layer of this model has a router"):
        attach_(dense.model, 2, 4.0, ("router",))
    for stage in (Recover, Distill):
        with pytest.raises(RecipeError, match=r"train: router trains the routers .* has none; give train: lora"):
            stage(train="router").check(dense.model, dense.arch)
