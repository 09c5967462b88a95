"""Checkpoints with forward patches, opened by transformers."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

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


def test_a_config_that_is_used_twice_gives_the_patched_model_twice(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    for _ in range(2):
        patched = AutoModelForCausalLM.from_pretrained(folder, config=config, trust_remote_code=True)
        assert torch.equal(logits(patched), logits(gated()))


def test_facts_of_loading_come_beside_the_patched_model_and_a_config_alone_has_none(folder: Path) -> None:
    patched, facts = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert torch.equal(logits(patched), logits(gated())) and not facts["missing_keys"]
    config = AutoConfig.from_pretrained(folder)
    with pytest.raises(ValueError, match="lies beside its weights; use from_pretrained"):
        AutoModelForCausalLM.from_config(config, trust_remote_code=True)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_what_is_written_from_a_model_that_was_opened_without_trust_names_what_is_there(
    tmp_path: Path, name: str
) -> None:
    model = gated(name)
    patch = ContextGates(model, 8, 0.9, seed=1).patch()
    unpatch_(model)
    arch = arch_for(model.config)
    save_checkpoint(model, arch.shapes(model), tmp_path / "gated", patches=[patch])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "gated")
    save_checkpoint(plain, arch.shapes(plain), tmp_path / "plain")
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    save_checkpoint(plain, arch.shapes(plain), tmp_path / "again", patches=[patch])
    patched = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(logits(patched), logits(gated(name)))


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
