"""What a model weighs, against closed forms, the files themselves, and the records of a pruning run."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, CodeGenConfig, CodeGenForCausalLM

from compresso.checkpoint.load import load_model
from compresso.checkpoint.source import open_source
from compresso.metrics.record import Environment, Measurement
from compresso.metrics.size import KV_BYTES, size_measurements, weight_bytes
from compresso.native import family_of
from compresso.runner.inspection import inspect
from tests.conftest import Ran

HERE = Environment.here()
HEADS = ("stages.magnitude_structured.kinds=[head,channel]",)


def by_name(found: tuple[Measurement, ...]) -> dict[str, Measurement]:
    named = {one.name: one for one in found}
    assert len(named) == len(found)
    return named


def test_a_tied_llama_by_hand(tiny_folder: Path) -> None:
    found = by_name(size_measurements(AutoModelForCausalLM.from_pretrained(tiny_folder), tiny_folder, HERE))
    blocks, embeddings, norms = 3 * (2 * 32 * 64 + 2 * 32 * 32 + 3 * 32 * 48), 1024 * 32, 7 * 32
    expected = {
        "parameters/total": blocks + embeddings + norms,
        "parameters/blocks": blocks,
        "parameters/embeddings": embeddings,
        "parameters/norms": norms,
        "macs/token": blocks + embeddings,
        "kv_bytes/token": 3 * 2 * 4 * 8 * KV_BYTES,
        "bytes/disk": (tiny_folder / "model.safetensors").stat().st_size,
    }
    assert {name: one.value for name, one in found.items()} == expected
    assert {one.unit for name, one in found.items() if name.startswith("parameters/")} == {"parameters"}
    assert [found[name].unit for name in ("macs/token", "kv_bytes/token", "bytes/disk")] == ["macs", "bytes", "bytes"]
    assert {name for name, one in found.items() if one.how != "counted"} == {"bytes/disk"}
    assert found["bytes/disk"].how == "measured"
    assert found["kv_bytes/token"].protocol == {"element_bytes": KV_BYTES}


@pytest.mark.slow
def test_a_live_per_layer_model_is_counted_as_it_was_written_and_left_as_it_is(ran: Ran) -> None:
    result = ran("gate-taylor", layout="native", sets=("stages.gate_taylor.batches=1",), max_steps=1)
    model = load_model(open_source(result.folder))
    assert family_of(model.config.model_type) != model.config.model_type
    modules, ids = list(model.modules()), torch.arange(8).unsqueeze(0)
    before = model(input_ids=ids).logits
    found = by_name(size_measurements(model, result.folder, HERE))
    after = result.records["after"]
    assert {group: found[f"parameters/{group}"].value for group in after["parameters"]} == after["parameters"]
    assert found["macs/token"].value == after["macs_per_token"] < result.records["before"]["macs_per_token"]
    assert found["bytes/disk"].value == result.records["bytes"]
    assert all(one is other for one, other in zip(modules, model.modules(), strict=True))
    assert torch.equal(model(input_ids=ids).logits, before)
    assert found == by_name(size_measurements(after, result.folder, HERE))


def test_a_model_nobody_described_has_a_total_and_no_zeros(tmp_path: Path) -> None:
    model = CodeGenForCausalLM(
        CodeGenConfig(vocab_size=32, n_embd=8, n_layer=1, n_head=2, n_positions=16, rotary_dim=4)
    )
    model.save_pretrained(tmp_path)
    found = by_name(size_measurements(model, tmp_path, HERE))
    assert set(found) == {"parameters/total", "bytes/disk"}
    assert found["parameters/total"].value == sum(p.numel() for p in model.parameters())
    assert "no architecture describes model_type 'codegen'" in (found["parameters/total"].remark or "")
    assert found["bytes/disk"].value == (tmp_path / "model.safetensors").stat().st_size


def test_inspect_counts_the_same(tiny_folder: Path) -> None:
    facts = inspect(tiny_folder)
    found = by_name(size_measurements(facts, None, HERE))
    assert "bytes/disk" not in found
    assert found == by_name(size_measurements(AutoModelForCausalLM.from_pretrained(tiny_folder), None, HERE))


def test_only_files_that_are_loaded_count(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "model")
    shutil.copy(tmp_path / "model" / "model.safetensors", tmp_path / "model" / "consolidated.safetensors")
    assert weight_bytes(tmp_path / "model") == weight_bytes(tiny_folder)
    sharded = AutoModelForCausalLM.from_pretrained(tiny_folder)
    sharded.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    files = list((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 1
    assert weight_bytes(tmp_path / "shards") == sum(file.stat().st_size for file in files)
