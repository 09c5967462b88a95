"""`compresso export`: the file is what the folder holds, is opened by the engine, and is not left behind if it should not be."""

import json
from pathlib import Path

import pytest

from compresso import cli, exporting
from compresso.data import nano
from compresso.errors import CheckpointError, ExportError
from compresso.export import gguf, llama_cpp
from compresso.verifying import Answer

reader = pytest.importorskip("gguf", reason="the gguf package is not installed")
engine = pytest.mark.skipif(llama_cpp.missing() is not None, reason=f"llama.cpp: {llama_cpp.missing()}")


def test_the_command_writes_and_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "nano.gguf"
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", str(nano.path()), "--format", "gguf", "--output", str(path), "--dtype", "q8_0", "--json"])
    assert stop.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["arch"], told["dtype"], told["bytes"]) == ("llama", "q8_0", path.stat().st_size)
    assert {one.tensor_type.name for one in reader.GGUFReader(path).tensors} == {"F32", "Q8_0"}
    if llama_cpp.missing() is None:
        assert told["checked"] == "opened in llama.cpp"
        assert told["difference"] < 0.05
    else:
        assert told["checked"] == f"not opened: {llama_cpp.missing()}"


@engine
def test_a_file_that_reads_back_differently_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = lambda tensor, size, heads=0: _maker(tensor, size)  # noqa: E731 - rows of q and k in transformers' order
    _maker = gguf._maker
    monkeypatch.setattr(gguf, "_maker", wrong)
    path = tmp_path / "nano.gguf"
    path.write_text("old")
    with pytest.raises(ExportError, match=r"nano\.gguf would read back differently in llama\.cpp: probabilities differ"):
        exporting.export(nano.path(), path, format="gguf", dtype="f32", force=True)
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("nano.gguf", "old")]


def test_bad_input_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match="unknown format 'ggml'; did you mean 'gguf'"):
        exporting.export(nano.path(), tmp_path / "x", format="ggml")
    with pytest.raises(ExportError, match="unknown dtype 'q4'"):
        exporting.export(nano.path(), tmp_path / "x", format="gguf", dtype="q4")
    (tmp_path / "there").write_text("")
    with pytest.raises(CheckpointError, match="--force"):
        exporting.export(nano.path(), tmp_path / "there", format="gguf")
    monkeypatch.setattr(gguf.importlib, "import_module", _absent)
    with pytest.raises(ExportError, match="pip install gguf"):
        exporting.export(nano.path(), tmp_path / "x", format="gguf")


def _absent(name: str) -> Answer:
    raise ImportError(name)
