"""Adapters on a base of few bits: learned on rounded weights, merged into the stored ones."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import compresso
from compresso.edit.few_bit_base import FewBits, linears_of_blocks, round_base_
from compresso.edit.lora import attach_
from compresso.errors import RecipeError
from compresso.methods import recover
from compresso.methods.magnitude_structured import MagnitudeStructured
from compresso.methods.recover import Recover
from compresso.metrics.held import held_loss
from tests.methods.conftest import MakeJob


@pytest.fixture
def bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The library, which `make bitsandbytes` puts into a folder of its own."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(sys.prefix) / "bitsandbytes")])
    pytest.importorskip("bitsandbytes", reason="bitsandbytes: not installed; make bitsandbytes")
    yield


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize(("to", "share", "off"), [("nf4", 1 / 2, 0.15), ("int8", 1, 0.02)])
def test_linears_of_blocks_are_rounded_and_compute_nearly_the_same(to: FewBits, share: float, off: float) -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    model = LlamaForCausalLM(config)  # bitsandbytes rounds matrices narrower than its block of 64 worse on AVX-512
    before = {name: linear.weight.detach().clone() for name, linear in linears_of_blocks(model)}
    generator = torch.Generator().manual_seed(0)
    x = {name: torch.randn(5, weight.shape[1], generator=generator) for name, weight in before.items()}
    held = round_base_(model, to)
    assert held.keys() == before.keys()
    for name, weight in before.items():
        assert torch.equal(held[name].weight, weight)
        small = model.get_submodule(name)
        stored = small.get_parameter("weight")
        assert stored.numel() * stored.element_size() == share * weight.numel()
        wanted = x[name] @ weight.T
        assert 1e-4 < float((small(x[name]) - wanted).norm() / wanted.norm()) < off


@pytest.mark.usefixtures("bitsandbytes")
@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_recovery_on_few_bits_lowers_the_loss_of_the_stored_model(make_job: MakeJob, base: FewBits) -> None:
    damaged = MagnitudeStructured(keep=0.6)(make_job())
    before = held_loss(damaged.model, damaged.held).mean
    kinds = {name: type(module) for name, module in damaged.model.named_modules()}
    dtypes = {name: parameter.dtype for name, parameter in damaged.model.named_parameters()}
    job = Recover(base=base, steps=40, batch=8, micro_batch=8, lr=1e-2)(damaged)
    assert held_loss(job.model, job.held).mean < before - 0.5
    assert {name: type(module) for name, module in job.model.named_modules()} == kinds
    assert {name: parameter.dtype for name, parameter in job.model.named_parameters()} == dtypes
    assert job.records["recover"]["base"] == {"learned_on": base, "linears": 21, "merged_into": "float32"}


@pytest.mark.usefixtures("bitsandbytes")
def test_only_adapters_change_the_stored_weights(make_job: MakeJob) -> None:
    job = make_job()
    before = {name: parameter.detach().clone() for name, parameter in job.model.named_parameters()}
    after = Recover(base="nf4", steps=3, batch=4, micro_batch=4, lr=1e-2, targets=("q_proj", "v_proj"))(job)
    moved = {name for name, parameter in after.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {f"model.layers.{i}.self_attn.{t}.weight" for i in range(3) for t in ("q_proj", "v_proj")}


@pytest.mark.usefixtures("bitsandbytes")
def test_what_learns_is_what_a_rounded_model_would_learn(make_job: MakeJob) -> None:
    """Oracle: adapters on a model whose weights are those that the rounded linears multiply by."""
    job = make_job()
    held = round_base_(job.model, "nf4")
    rounded = {name: job.model.get_submodule(name)(torch.eye(one.in_features)).T for name, one in held.items()}
    plain = make_job(folder="plain")
    for name, weight in rounded.items():
        plain.model.get_submodule(name).get_parameter("weight").data.copy_(weight)
    losses = []
    for one in (job, plain):
        adapted = attach_(one.model, 4, 8, seed=1)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.constant_(parameter, 0.01)
        ids = torch.tensor([job.rows[0]["input_ids"]])
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        grads = {name: parameter.grad for name, parameter in adapted.named_parameters() if "lora_A" in name}
        losses.append((loss.detach(), grads))
    torch.testing.assert_close(losses[0][0], losses[1][0], atol=1e-5, rtol=1e-5)
    for name, grad in losses[0][1].items():
        assert grad is not None
        torch.testing.assert_close(grad, losses[1][1][name], atol=1e-5, rtol=1e-3)


@pytest.mark.usefixtures("bitsandbytes")
def test_a_model_whose_blocks_have_no_linears_is_refused(make_job: MakeJob) -> None:
    job = make_job()
    for name, linear in list(linears_of_blocks(job.model)):
        owner, _, own = name.rpartition(".")
        setattr(job.model.get_submodule(owner), own, nn.Conv1d(linear.in_features, linear.out_features, 1))
    with pytest.raises(RecipeError, match="base: nf4 rounds the linears of blocks"):
        round_base_(job.model, "nf4")
    with pytest.raises(RecipeError, match="base: nf4 rounds the linears of blocks"):  # before anything runs
        Recover(base="nf4").check(job.model, job.arch)


def test_without_the_library_the_cure_is_named_before_training(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    job = make_job()
    with pytest.raises(RecipeError, match=r"pip install 'compresso-llm\[bits\]'"):
        Recover(base="int8").check(job.model, job.arch)


def test_several_processes_are_refused(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recover, "library", lambda: None)
    with pytest.raises(
        RecipeError, match="base=int8 is trained in one process, and not in 2; leave base out, or take one"
    ):
        Recover(base="int8").check_processes(2)
    recipe = {"name": "some", "stages": [{"recover": {"steps": 2, "base": "int8", "batch": 8, "micro_batch": 1}}]}
    assert compresso.plan(recipe, tiny_folder, device="h100")["training"]
    with pytest.raises(
        RecipeError, match="base=int8 is trained in one process, and not in 8; leave base out, or take one"
    ):
        compresso.plan(recipe, tiny_folder, device="8xh100")  # as a launch does


def test_a_base_of_few_bits_is_for_adapters() -> None:
    with pytest.raises(ValueError, match="train=all is not adapters alone"):
        replace(Recover(train="all"), base="nf4")
