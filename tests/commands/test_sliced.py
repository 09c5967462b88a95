"""`compresso export --format sliced`: what slicegpt cut becomes a narrower model, opened by transformers with compresso
or with the file beside the weights, and by nothing else.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import Call, reopen_here
from transformers import AutoModelForCausalLM

import compresso
from compresso.checkpoint.code import trusted
from compresso.checkpoint.source import open_source
from compresso.commands.export import export
from compresso.engines.parity import Format, ids_of, reference_of
from compresso.engines.transformers import OWN, PLAIN, REMOTE, SLICED, Transformers
from compresso.engines.transformers_process import NEW_TOKENS
from compresso.engines.verify import parities
from compresso.errors import CheckpointError, ExportError
from compresso.native import SLICED_FILE
from compresso.runner.run import Result, run

IDS = torch.arange(3, 40).unsqueeze(0)


@pytest.fixture(scope="module")
def cut(tiny_folder: Path, instructions: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """What a run of slicegpt wrote."""
    knobs = {"keep": 0.75, "only_if_smaller": False, "examples": 8, "batch": 4}
    raw = {"name": "mine", "data": {"held": 4, "pack": False, "limit": 12}, "stages": [{"slicegpt": knobs}]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compresso.runner.output.reopen_and_compare", reopen_here)
        output = tmp_path_factory.mktemp("cut") / "out"
        return run(raw, tiny_folder, instructions, output=output, quiet=True, allow_collapsed=True, measure="none")


def unasked(folder: Path, output: Path) -> dict[str, Any]:
    """The export, without the process that opens it: `test_verify_...` has that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transformers, "missing", lambda _: "not asked here")
        return export(folder, output, format="sliced")


@pytest.fixture(scope="module")
def sliced(cut: Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That, exported; its `facts` lie beside it."""
    folder = tmp_path_factory.mktemp("sliced") / "out"
    (folder.parent / "facts.json").write_text(json.dumps(unasked(cut.folder, folder)))
    return folder


def test_it_computes_the_same_with_as_many_numbers_as_the_run_said(cut: Result, sliced: Path) -> None:
    facts, noted = json.loads((sliced.parent / "facts.json").read_text()), cut.records["stages"]["slicegpt"]
    assert facts["arch"] == "compresso_sliced_llama" and facts["dtype"] == "float32"
    opened = [AutoModelForCausalLM.from_pretrained(sliced, dtype=torch.float32).eval()]
    opened.append(compresso.load(sliced, dtype=torch.float32).model.eval())
    reloaded = compresso.load(cut.folder, dtype=torch.float32).model.eval()
    ask: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        live = cut.model.eval()(input_ids=IDS).logits
        torch.testing.assert_close(reloaded(input_ids=IDS).logits, live, atol=1e-5, rtol=0)
        for one in opened:
            torch.testing.assert_close(one(input_ids=IDS).logits, live, atol=1e-4, rtol=1e-4)
            cached, plain = (one.generate(IDS, use_cache=use, **ask) for use in (True, False))
            assert torch.equal(cached, plain) and torch.equal(cached, cut.model.generate(IDS, **ask))
    stored = load_file(sliced / "model.safetensors")
    numbers = sum(one.numel() for one in stored.values())
    assert numbers == sum(one.numel() for one in opened[0].parameters()) == noted["sliced_parameters"]
    assert opened[0].config.stream_width == noted["stream_width"] == stored["model.embed_tokens.weight"].shape[1]
    card = " ".join((sliced / "README.md").read_text().split())
    assert f"{numbers:,} in place of {noted['dense_parameters']:,}" in card and "vLLM have no shortcuts" in card
    run_card = " ".join((cut.folder / "README.md").read_text().split())
    assert "compresso export --format sliced writes the narrower one" in run_card
    assert "engines compute the dense model" in run_card


@pytest.mark.slow
def test_three_ways_into_it_and_what_each_says(cut: Result, sliced: Path) -> None:
    assert trusted(sliced)
    reference = reference_of(cut.model.eval(), ids_of(None, cut.model.config.vocab_size))
    for engine in (OWN, REMOTE):
        found = engine.parity(sliced, reference)
        assert (found.opens, found.same_tokens) == ("yes", NEW_TOKENS), found.reason
    found = PLAIN.parity(sliced, reference)
    assert found.opens == "no" and "contains custom code" in found.reason


@pytest.mark.slow
def test_verify_says_who_computes_the_dense_model_and_tries_the_narrower_one(
    cut: Result, tiny_folder: Path, tmp_path: Path
) -> None:
    source, reference = open_source(cut.folder), reference_of(cut.model.eval(), IDS[0])
    (found,) = parities(Format.SLICED, [SLICED], source, reference, tmp_path)
    assert (found.engine, found.opens, found.same_tokens) == ("transformers, sliced", "yes", NEW_TOKENS)
    assert parities(Format.SLICED, [SLICED], open_source(tiny_folder), reference, tmp_path) == []
    for found in parities(Format.CHECKPOINT, [PLAIN, OWN], source, reference, tmp_path):
        assert found.opens == "no" and "it would compute the dense model" in found.reason
    for written in (Format.GGUF, Format.ONNX, Format.DECI):
        (found,) = parities(written, [PLAIN], source, reference, tmp_path)
        assert found.opens in ("not checked", "not installed")
        assert found.opens != "not checked" or f"which {written} does not hold" in found.reason
    assert not list(tmp_path.iterdir())


def test_what_would_lose_the_cut_is_refused_in_one_line(cut: Result, sliced: Path, call: Call, tmp_path: Path) -> None:
    lost = "its stream is cut by slicegpt, which vllm-deci does not hold: what it would write is the dense model"
    opened = "its stream is sliced, which only transformers opens. Give the folder that it was exported"
    run_lost = "its stream is cut by a forward patch of slicegpt, which a run would lose"
    for words, said in (
        (("export", cut.folder, "--format", "vllm-deci", "--output", tmp_path / "out"), lost),
        (("run", "magnitude/50", "--model", cut.folder, "--output", tmp_path / "out"), run_lost),
        (("export", sliced, "--format", "gguf", "--output", tmp_path / "out.gguf"), opened),
        (("plan", "magnitude/50", "--model", sliced), opened),
    ):
        code, _, error = call(*words)
        assert code == 2 and said in error and len(error.strip().splitlines()) == 1
    changed = tmp_path / "changed"
    shutil.copytree(cut.folder, changed)
    records = json.loads((changed / "records.json").read_text())
    records["stages"]["rtn"] = {"bits": 4.5}
    (changed / "records.json").write_text(json.dumps(records))
    with pytest.raises(ExportError, match="rtn rounded its weights, which a rotation undoes; leave rtn out"):
        export(changed, tmp_path / "none", format="sliced")
    shutil.rmtree(changed / "patches")
    with pytest.raises(CheckpointError, match=r"tensors\.safetensors is missing"):
        compresso.load(changed)


def test_nothing_to_slice_is_said(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="slicegpt cut nothing in it, so there is nothing to slice; run slicegpt"):
        export(tiny_folder, tmp_path / "none", format="sliced")


def test_its_code_is_run_byte_for_byte_or_not(sliced: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(sliced, folder)
    code = folder / SLICED_FILE.name
    code.write_bytes(code.read_bytes() + b"\nopen('ran', 'w')\n")
    with pytest.raises(CheckpointError, match="is not the file that this version of compresso writes, and is not run"):
        trusted(folder)
    assert compresso.load(folder).model(input_ids=IDS).logits.isfinite().all()  # which does not read it


@pytest.mark.parametrize(("field", "value"), [("stream_width", 0), ("head_width", 10**9), ("stream_width", "two")])
def test_a_strangers_widths_are_refused_in_one_line(field: str, value: object, sliced: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(sliced, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(CheckpointError) as raised:
        compresso.load(folder)
    assert field in str(raised.value) and "\n" not in str(raised.value)
