"""Blocks at levels of a bank compute what the removed and fitted ones would, in any order, however little is kept."""

from pathlib import Path

import pytest
import torch
from tests.arch.conftest import build
from tests.sweep.test_bank import rows, run_of
from torch import Tensor
from transformers import PreTrainedModel

from compresso.arch.base import arch_for
from compresso.arch.queries import axes_of
from compresso.core.axis import Kind
from compresso.edit.gate import gated
from compresso.solve.bank_choice import Menu, menu
from compresso.sweep.bank import BankKnobs, make_bank
from compresso.sweep.bank_levels import BankLevels
from compresso.sweep.calibration import Calibration

ALL = (Kind.ATTENTION, Kind.MLP, Kind.HEAD, Kind.QUERY, Kind.CHANNEL)


def subject(name: str, folder: Path) -> tuple[PreTrainedModel, Menu]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(name).eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    run = run_of(model, folder, rows(8, 12, vocabulary=model.config.vocab_size))
    return model, menu(make_bank(run, Calibration(batch=4), BankKnobs(moments=True)), ALL, steps=3)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 15).unsqueeze(0)).logits


def installed(fitted: BankLevels, choice: Menu, levels: tuple[int, ...], blocks: int) -> None:
    for block in reversed(range(blocks)):
        fitted(block, tuple(n for n, one in zip(levels, choice.sub_layers, strict=True) if one.layer == block))


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "gemma2"])
def test_a_block_at_levels_is_the_fitted_one_without_what_leaves(name: str, tmp_path: Path) -> None:
    model, choice = subject(name, tmp_path)
    arch = arch_for(model.config)
    whole, blocks = logits(model), len(arch.blocks(model))
    fitted = BankLevels(model, arch, choice, tmp_path / "bank", 0.01)
    levels = (*((3 * i + 1) % len(of) for i, of in enumerate(choice.levels[:-1])), len(choice.levels[-1]) - 1)
    assert choice.picked(levels)[-1][1].gone
    installed(fitted, choice, levels, blocks)
    found = logits(model)
    assert not torch.allclose(found, whole)
    installed(fitted, choice, choice.dense, blocks)
    assert torch.equal(logits(model), whole)
    fitted.fit_(levels)
    axes = axes_of(arch, model, (Kind.QUERY,))
    with gated(model, axes, choice.plan(levels, layers=False).masks(axes)):
        torch.testing.assert_close(logits(model), found, rtol=1e-4, atol=1e-4)


def test_weights_that_were_dropped_come_back_the_same(tmp_path: Path) -> None:
    model, choice = subject("llama_gqa", tmp_path)
    arch, found = arch_for(model.config), list[Tensor]()
    blocks = len(arch.blocks(model))
    narrow = tuple(1 for _ in choice.levels)
    for room in (2**30, 0):
        fitted = BankLevels(model, arch, choice, tmp_path / "bank", 0.01, max_bytes=room)
        for levels in (narrow, choice.dense, narrow):
            installed(fitted, choice, levels, blocks)
        found.append(logits(model))
        installed(fitted, choice, choice.dense, blocks)
    assert torch.equal(*found)
