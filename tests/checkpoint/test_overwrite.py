"""What --overwrite replaces: all that a command writes, and nothing that anybody else did."""

import json
from pathlib import Path, PurePosixPath

import pytest
from transformers import AutoTokenizer

import compresso
from compresso.checkpoint.atomic import check_output
from compresso.checkpoint.overwrite import EXPORTS, ONNX_MARKS, PACKED_MARK, RUN, demo, fits, refuse_foreign
from compresso.data import nano
from compresso.edit.patches import TENSORS
from compresso.errors import CheckpointError
from tests.conftest import Call, Ran

PRUNE_ONLY = {"stages": [{"magnitude_structured": {"keep": 0.9}}]}


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "layout"),
    [("gate-taylor", "auto"), ("magnitude-structured", "native"), ("magnitude-structured", "padded")],
)
def test_all_that_a_run_writes_may_be_replaced(ran: Ran, recipe: str, layout: str) -> None:
    refuse_foreign(ran(recipe, layout=layout).folder, RUN)


def test_tensors_of_patches_belong_to_a_run() -> None:
    """No recipe that ships writes them."""
    assert any(fits(PurePosixPath(TENSORS), pattern) for pattern in RUN.files)


@pytest.mark.parametrize(
    "name", ["notes.txt", "model.gguf", "old/model.safetensors", ".git/config", "adapters/mine.txt", "records.json.bak"]
)
def test_a_foreign_file_is_named_and_stays(ran: Ran, call: Call, tiny_folder: Path, tmp_path: Path, name: str) -> None:
    output = tmp_path / "out"
    output.mkdir()
    for file in ("records.json", "config.json", "README.md"):
        (output / file).write_bytes((ran("magnitude-structured").folder / file).read_bytes())
    refuse_foreign(output, RUN)
    (output / name).parent.mkdir(exist_ok=True)
    (output / name).write_text("mine")
    there = files(output)
    code, _, error = call(
        "run", "magnitude/50", "--model", tiny_folder, "--output", output, "--overwrite", "--allow-collapsed"
    )
    assert code == 2
    assert f"holds {name}, which compresso run did not write" in error
    assert files(output) == there and (output / name).read_text() == "mine"


def test_a_file_that_comes_during_the_run_stays(
    tiny_folder: Path, ran: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "records.json").write_bytes((ran("magnitude-structured").folder / "records.json").read_bytes())

    def reopened(*_: object, **__: object) -> float:
        (output / "model.gguf").write_text("exported meanwhile")
        return 0.0

    monkeypatch.setattr("compresso.runner.output.reopen_and_compare", reopened)
    with pytest.raises(CheckpointError, match=r"holds model\.gguf"):
        compresso.run(PRUNE_ONLY, tiny_folder, output=output, quiet=True, overwrite=True)
    assert files(output) == {"records.json", "model.gguf"}


def test_folders_of_others_are_refused(call: Call, tiny_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.json", "model.safetensors"):
        (other / name).write_bytes((tiny_folder / name).read_bytes())
    for written in (
        RUN,
        EXPORTS["onnx"],
        EXPORTS["vllm-deci"],
        *map(EXPORTS.__getitem__, ("compressed-tensors", "low-rank")),
        demo(("a",)),
    ):
        with pytest.raises(CheckpointError, match=rf"was not written by compresso {written.by} .* Choose another"):
            refuse_foreign(other, written)
    (other / "records.json").write_text(json.dumps({"mine": 1}))
    with pytest.raises(CheckpointError, match="was not written"):
        refuse_foreign(other, RUN)
    with pytest.raises(CheckpointError, match=r"is not empty, and was not written by compresso run\. Choose another"):
        check_output(other, None, False, RUN)
    code, _, error = call("export", nano.path(), "--format", "onnx", "--output", other)
    assert code == 2 and "and was not written by compresso export" in error and "--overwrite" not in error
    code, _, error = call("export", nano.path(), "--format", "onnx", "--output", other, "--overwrite")
    assert code == 2 and "was not written by compresso export" in error
    (tmp_path / "notes.gguf").write_text("mine")
    code, _, error = call("export", nano.path(), "--format", "gguf", "--output", tmp_path / "notes.gguf", "--overwrite")
    assert code == 2 and "is no GGUF file" in error
    assert call("export", nano.path(), "--format", "gguf", "--output", tmp_path / "notes.gguf")[2] == error
    assert (tmp_path / "notes.gguf").read_text() == "mine"


def test_what_is_not_there_or_empty_passes(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "nowhere"):
        refuse_foreign(folder, RUN)


def test_exports_and_demos_are_known_again(call: Call, ran: Ran, tmp_path: Path) -> None:
    deci = tmp_path / "deci"
    arguments = ("export", nano.path(), "--format", "vllm-deci", "--output", deci)
    assert call(*arguments)[0] == 0
    assert "--overwrite" in call(*arguments)[2]
    assert call(*arguments, "--overwrite")[0] == 0
    (deci / "mine").touch()
    assert "holds mine" in call(*arguments, "--overwrite")[2]
    assert "holds mine, which compresso export did not write. Choose another output, or move" in call(*arguments)[2]
    onnx = tmp_path / "onnx"
    onnx.mkdir()
    AutoTokenizer.from_pretrained(nano.path()).save_pretrained(onnx)
    for name in ("model.onnx", "model.onnx.data", "config.json"):
        (onnx / name).touch()
    with pytest.raises(
        CheckpointError, match="was not written by compresso export"
    ):  # another exporter's has the same names
        refuse_foreign(onnx, EXPORTS["onnx"])
    for mark in ONNX_MARKS:
        (onnx / "config.json").write_text(json.dumps({"model_type": "llama", mark: ["input_ids"]}))
        refuse_foreign(onnx, EXPORTS["onnx"])
    shown = tmp_path / "demo"
    shown.mkdir()
    (shown / "report.json").touch()
    (shown / "report.html").touch()
    run = ran("magnitude-structured").folder
    (shown / "magnitude").mkdir()
    for name in files(run):
        (shown / "magnitude" / name).parent.mkdir(exist_ok=True)
        (shown / "magnitude" / name).touch()
    refuse_foreign(shown, demo(("magnitude", "compresso")))
    (shown / "magnitude" / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match=r"holds magnitude/thesis\.tex, which compresso demo did not write"):
        refuse_foreign(shown, demo(("magnitude", "compresso")))


def test_packed_weights_of_others_are_not_replaced(tmp_path: Path) -> None:
    """Anybody's compressed-tensors folder has the same files; ours is known by its card."""
    config = {"model_type": "llama", "quantization_config": {"quant_method": "compressed-tensors"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "README.md").write_text("# A friend's model, packed by compressed-tensors\n")
    with pytest.raises(CheckpointError, match="was not written by compresso export"):
        refuse_foreign(tmp_path, EXPORTS["compressed-tensors"])
    (tmp_path / "README.md").write_text(f"# Packed\n\n12 linears that compresso {PACKED_MARK} compressed-tensors\n")
    refuse_foreign(tmp_path, EXPORTS["compressed-tensors"])


@pytest.mark.slow
def test_a_gguf_of_others_is_not_replaced(call: Call, tmp_path: Path) -> None:
    gguf, path = pytest.importorskip("gguf", reason="gguf: not installed"), tmp_path / "friend.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.name", "a friend's")
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    theirs = path.read_bytes()
    arguments = ("export", nano.path(), "--format", "gguf", "--dtype", "f16", "--output")
    code, out, error = call(*arguments, path, "--overwrite")
    assert (code, out, len(error.splitlines())) == (2, "", 1) and "without the field general.written_by" in error
    assert path.read_bytes() == theirs
    assert call(*arguments, tmp_path / "own.gguf")[0] == 0
    assert call(*arguments, tmp_path / "own.gguf", "--overwrite")[0] == 0
