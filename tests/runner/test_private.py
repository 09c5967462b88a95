"""The whole way with a home of its own, and then a search of everything that was written for what tells whose it is."""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from compresso.commands.compare import compare
from compresso.commands.evaluate import evaluate
from compresso.commands.export import export
from compresso.engines import verify as verify_module
from compresso.engines.parity import Parity
from compresso.engines.verify import parity_records
from compresso.runner.run import run

OWNER = "xyzzyowner"


@pytest.fixture
def home(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a model, some data and a folder for temporary files, in which one works."""
    home = tmp_path / "homes" / OWNER
    (home / "tmp").mkdir(parents=True)
    shutil.copytree(tiny_folder, home / "models" / "small")
    rows = [{"text": f"Once upon a time there was a house by river number {n}."} for n in range(24)]
    whole = "".join(json.dumps(row) + "\n" for row in rows)
    (home / "whole.jsonl").write_text(whole)
    (home / "texts.jsonl").write_text(whole + "no row\n")
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(home))
    for name in ("USER", "LOGNAME", "USERNAME"):
        monkeypatch.setenv(name, OWNER)
    monkeypatch.setattr(tempfile, "tempdir", str(home / "tmp"))
    monkeypatch.chdir(home)

    def engines(folder: Path) -> list[Parity]:
        """What engines say where much is missing."""
        places = (folder, home, home / "tmp" / "tmp1" / "model.gguf", Path(sys.prefix), home / "models" / "small")
        return [Parity(f"engine {n}", "no", f"cannot open '{place}': {place}/x.bin") for n, place in enumerate(places)]

    monkeypatch.setattr(verify_module, "verify", engines)
    monkeypatch.setattr("compresso.runner.execution.parity_records", parity_records)
    return home


def told(folder: Path) -> list[str]:
    """Files below a folder that name its owner, or a folder of this machine."""
    secrets = [OWNER.encode(), sys.prefix.encode(), str(Path(verify_module.__file__).parents[3]).encode()]
    return [
        f"{path}: {secret.decode()}"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        for secret in secrets
        if secret in path.read_bytes()
    ]


@pytest.mark.slow
def test_nothing_that_is_written_tells_whose_it_is(home: Path) -> None:
    out = home / "results" / "out"
    recipe = {"data": {"source": None, "max_length": 32, "held": 4, "pack": False}, "stages": [{"wanda": {}}]}
    result = run(
        recipe,
        str(home / "models" / "small"),
        str(home / "texts.jsonl"),
        output=out,
        verify=True,
        quiet=True,
        skip_bad=True,
        allow_collapsed=True,
    )
    reasons = [one["reason"] for one in result.records["engines"]]
    assert reasons[2] == "cannot open 'a temporary file': a temporary file"
    assert reasons[4] == "cannot open 'small': x.bin"
    compare([out], home / "results" / "compared.html")
    evaluate(
        str(out),
        corpus=str(home / "whole.jsonl"),
        protocol="llm-pruner",
        limit=None,
        device="cpu",
        output=home / "results" / "measured.json",
        data_root=None,
    )
    export(out, home / "results" / "model.gguf", format="gguf", dtype="f32")
    assert {"README.md", "records.json", "report.html", "plan.json", "recipe.yaml", "config.json"} <= {
        path.name for path in out.iterdir()
    }
    assert told(home / "results") == []
    assert "_name_or_path" not in (out / "config.json").read_text()
    (home / "results" / "canary").write_text(str(home))
    assert len(told(home / "results")) == 1


@pytest.mark.slow
def test_records_of_another_machine_are_shown_without_its_folders(home: Path) -> None:
    """As those of an earlier release have them."""
    out = home / "out"
    run({"stages": [{"magnitude": {"sparsity": 0.0}}]}, str(home / "models" / "small"), output=out, quiet=True)
    records = json.loads((out / "records.json").read_text())
    records["engines"] = [{"engine": "x", "opens": "no", "reason": "install --prefix /home/somebody/env/venv x"}]
    records["report"]["models"][0]["not_measured"] = {"speed": r"C:\Users\somebody\x.dll is missing"}
    (out / "records.json").write_text(json.dumps(records))
    compare([out], home / "compared.html")
    page = (home / "compared.html").read_text()
    assert "somebody" not in page and "install --prefix venv x" in page
