"""Patches as values: both forms that records hold come back as what was written, with their tensors."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.edit.shifting import shift, shift_, shifts_known, unshift_
from tests.edit.test_prefill import model_of

from compresso.edit.patch import KINDS, Patch, PatchKind, register
from compresso.edit.patches import TENSORS, patch_, read_patches, save_tensors, unpatch_, written
from compresso.edit.prefill import prefill_patch
from compresso.edit.round_inputs import round_inputs_patch
from compresso.errors import ArchError, CheckpointError

IDS = torch.arange(1, 20).unsqueeze(0)
LINE = "round_inputs token model.layers.1.mlp.up_proj"


@pytest.fixture
def shifts() -> Iterator[None]:
    with shifts_known():
        yield


def test_every_kind_is_known_to_a_process_that_only_reads_patches() -> None:
    """Whatever else was imported: a checkpoint is opened by `compresso.load` alone."""
    program = (
        "import importlib, pkgutil, compresso.edit as package\n"
        "from compresso.edit.patches import KINDS\n"
        "known = set(KINDS)\n"
        "for one in pkgutil.iter_modules(package.__path__): importlib.import_module('compresso.edit.' + one.name)\n"
        "print(sorted(known), sorted(set(KINDS) - known))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert found.strip() == f"{sorted(KINDS.keys() - {'shift'})} []"


def test_lines_of_release_0_1_are_read_and_written_as_they_were() -> None:
    lines = ["skip_in_prefill 1 2", LINE, "skip_in_prefill", "round_inputs tensor"]
    assert read_patches(lines) == (
        prefill_patch([2, 1]),
        round_inputs_patch("token", ["model.layers.1.mlp.up_proj"]),
        prefill_patch([]),
        round_inputs_patch("tensor", []),
    )
    assert written(read_patches(lines)) == lines
    objects = [{"name": "skip_in_prefill", "params": {"layers": [1, 2]}}]
    assert written(read_patches(objects)) == lines[:1]


@pytest.mark.usefixtures("shifts")
def test_patches_with_tensors_come_back_from_a_folder(tmp_path: Path) -> None:
    model = model_of("llama")
    dense = model(input_ids=IDS).logits
    patches = [shift(), *read_patches([LINE]), shift(times=-1.0)]
    patch_(model, patches)
    patched = model(input_ids=IDS).logits
    assert not torch.equal(patched, dense)
    save_tensors(patches, tmp_path)
    records = json.loads(json.dumps(written(patches)))
    assert records[1] == LINE and records[0]["tensors"] == ["by"]
    again = read_patches(records, tmp_path)
    assert again == tuple(patches)
    unpatch_(model)
    assert torch.equal(model(input_ids=IDS).logits, dense)
    patch_(model, again)
    assert torch.equal(model(input_ids=IDS).logits, patched)
    for patch in again:
        patch.undo_(model)
    assert torch.equal(model(input_ids=IDS).logits, dense)


def test_without_tensors_no_file_is_written(tmp_path: Path) -> None:
    save_tensors(read_patches([LINE]), tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures("shifts")
def test_missing_and_damaged_tensors_are_refused(tmp_path: Path) -> None:
    records = written([shift()])
    for folder in (None, tmp_path):
        with pytest.raises(CheckpointError, match=r"tensors\.safetensors is missing"):
            read_patches(records, folder)
    save_tensors([replace(shift(), tensors={"other": torch.ones(2)})], tmp_path)
    with pytest.raises(CheckpointError, match=r"has no '0\.by', which forward patch 'shift' computes with"):
        read_patches(records, tmp_path)
    (tmp_path / TENSORS).write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"tensors\.safetensors is damaged"):
        read_patches(records, tmp_path)


def test_what_is_unknown_says_so_and_changes_nothing() -> None:
    model = model_of("llama")
    dense = model(input_ids=IDS).logits
    for wrong in (
        "merge_tokens 3",
        "skip_in_prefill x",
        "round_inputs row",
        "",
        {"name": "merge_tokens", "params": {}},
    ):
        with pytest.raises(ArchError, match="is unknown to this compresso; use the version that wrote it"):
            patch_(model, read_patches([LINE, wrong]))
    with pytest.raises(ArchError, match="'merge_tokens' is unknown to this compresso"):
        patch_(model, [*read_patches([LINE]), Patch("merge_tokens")])
    assert torch.equal(model(input_ids=IDS).logits, dense)
    newer = {"name": "skip_in_prefill", "params": {"layers": [1], "tokens": 3}}
    with pytest.raises(
        ArchError, match=r"has the params \['layers', 'tokens'\], and this compresso wants \['layers'\]"
    ):
        read_patches([newer])


def test_two_kinds_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two kinds of patch are called 'skip_in_prefill'"):
        register(PatchKind("skip_in_prefill", frozenset(), shift_, unshift_))
