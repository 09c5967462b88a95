"""Checkpoints with forward patches, opened by transformers."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import compresso
from compresso.arch.base import arch_for
from compresso.checkpoint.code import trusted
from compresso.edit.context_gates import ContextGates
from compresso.edit.patches import unpatch_
from compresso.errors import CheckpointError
from compresso.formats.hf import save_checkpoint
from compresso.native import PATCHED_FILE
from tests.edit.test_context_gates import dense, gated, ids


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = gated()
    gates = ContextGates(model, 8, 0.9, seed=1)
    patch = gates.patch()
    unpatch_(model)
    save_checkpoint(model, arch_for(model.config).shapes(model), tmp_path / "gated", patches=[patch])
    return tmp_path / "gated"


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids(), use_cache=False).logits
    return found


def test_with_trust_transformers_opens_the_patched_model_and_without_it_the_weights(folder: Path) -> None:
    patched = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(logits(patched), logits(gated()))
    assert torch.equal(logits(patched), logits(compresso.load(folder).model))
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(plain), logits(dense("llama")))
    assert not torch.equal(logits(plain), logits(patched))


def test_what_is_saved_from_the_patched_model_names_no_code(folder: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_engines_need_not_run_the_file_and_a_changed_one_is_refused(folder: Path) -> None:
    assert not trusted(folder)
    with (folder / PATCHED_FILE.name).open("a") as file:
        file.write("\n")
    with pytest.raises(CheckpointError, match="is not the file that this version of compresso writes"):
        trusted(folder)


def test_without_patches_no_class_file_is_written(tmp_path: Path) -> None:
    model = dense("llama")
    save_checkpoint(model, arch_for(model.config).shapes(model), tmp_path / "plain")
    assert not (tmp_path / "plain" / PATCHED_FILE.name).exists()
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())
