"""`compresso measure` from the command line: the report it writes, the table it prints, and what it refuses before it
reads a weight.
"""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from tests.conftest import Call, Ran

from compresso.checkpoint.source import open_source
from compresso.commands import measure as measuring
from compresso.commands.measure_table import remarks, rows
from compresso.metrics.record import Environment, Measurement, ModelResults, Report

BRIEF = ("--prompt-tokens", 4, "--new-tokens", 2, "--rounds", 2)


@pytest.fixture
def pruned(ran: Ran) -> Path:
    return ran("gate-taylor", layout="native", sets=("stages.gate_taylor.batches=1",), max_steps=1).folder


@pytest.mark.slow
def test_dense_and_pruned_side_by_side(call: Call, tiny_folder: Path, pruned: Path, tmp_path: Path) -> None:
    output = tmp_path / "measured.json"
    code, out, error = call("measure", tiny_folder, pruned, *BRIEF, "--batch", "1,3", "--no-memory", "--output", output)
    assert code == 0, error
    report = Report.model_validate_json(output.read_text("utf-8"))
    dense, small = report.models
    assert [dense.name, small.name] == [tiny_folder.name, pruned.name]
    assert [one.fingerprint for one in report.models] == [
        open_source(folder).identity.fingerprint for folder in (tiny_folder, pruned)
    ]
    assert [
        (small.value(name) or 0) < (dense.value(name) or 0)
        for name in ("parameters/blocks", "bytes/disk", "macs/token")
    ] == [True] * 3
    for batch in (1, 3):
        assert (small.value(f"decode_bound/batch{batch}") or 0) > 1
        assert (small.value(f"decode_speedup/batch{batch}") or 0) > 0
        assert dense.value(f"decode_speedup/batch{batch}") is None
    assert dense.value("memory/peak") is None
    lines = [line for line in out.splitlines() if "│" in line]
    kinds = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in lines}
    assert (kinds["decode speed-up"], kinds["decode bound (bytes)"], kinds["parameters"]) == (
        "measured",
        "estimated",
        "counted",
    )
    assert [kinds["batch 1"], kinds["batch 3"]] == ["", ""]
    assert all(name in out for name in (tiny_folder.name, pruned.name, "(reference)"))
    flat = " ".join(out.split())
    assert all(line in flat for line in remarks(report.models))
    assert error == "", "what is quick needs no sign of life"


def test_json_is_the_account_and_nothing_else(call: Call, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []

    def peak(folder: Path, **given: object) -> Measurement:
        asked.append({"folder": folder, **given})
        protocol = {"batch": 2}
        return Measurement(
            name="memory/peak",
            value=5e7,
            unit="bytes",
            how="measured",
            protocol=protocol,
            environment=Environment.here(),
        )

    monkeypatch.setattr(measuring, "peak_memory", peak)
    code, out, _ = call("measure", tiny_folder, tiny_folder, *BRIEF, "--batch", "2,2", "--dtype", "bfloat16", "--json")
    assert code == 0
    report = Report.model_validate(json.loads(out))
    assert [one.name for one in report.models] == ["tiny", "tiny (2)"]
    assert [one["folder"] for one in asked] == [tiny_folder] * 2
    assert (asked[0]["batch"], asked[0]["prompt_tokens"], asked[0]["new_tokens"]) == (2, 4, 2)
    timed = [one for one in report.models[1].measurements if one.unit == "tokens/s"]
    assert [one.name for one in timed] == ["prefill/batch2", "decode/batch2"]
    assert {one.environment.dtype for one in timed} == {"bfloat16"}
    assert report.models[1].value("decode_bound/batch2") == 1
    assert report.models[1].value("memory/peak") == 5e7


@pytest.fixture
def nothing_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(measuring, "load_model", refuse)
    monkeypatch.setattr(measuring, "peak_memory", refuse)


@pytest.mark.usefixtures("nothing_read")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("./missing/model",), "CheckpointError: model ./missing/model does not exist."),
        (("--batch", "1,two"), "DataError: --batch '1,two' is not a list of whole numbers; wanted something like 1,8"),
        (("--batch", "0"), "--batch 0: all must be at least 1"),
        (("--rounds", "0"), "--rounds 0"),
        (("--dtype", "flaot32"), "--dtype 'flaot32' is unknown; did you mean 'float32'?"),
        (
            ("--prompt-tokens", "1000", "--new-tokens", "64"),
            "exceed the context of tiny, 1024; lower --prompt-tokens or --new-tokens",
        ),
        (("--prompt-tokens", "0"), "both must be at least 1"),
        (("--output", "no/such/file.json"), "is no folder that can be written to. Choose another output."),
        (("--output", "."), "output . is a folder; a file is wanted"),
        (("--batch",), "usage: "),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    call: Call, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, error = call("measure", tiny_folder, *given)
    assert (code, out) == (2, "")
    assert message in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("nothing_read")
def test_a_config_without_weights_and_an_unsafe_model_are_refused(
    call: Call, tiny_folder: Path, tmp_path: Path
) -> None:
    assert "has no weights to measure" in call("measure", tiny_folder, tiny_folder / "config.json")[2]
    shutil.copytree(tiny_folder, tmp_path / "pickled")
    assert (
        "lies in the folder of a measured model"
        in call("measure", tmp_path / "pickled", "--output", tmp_path / "pickled" / "config.json")[2]
    )
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    code, _, error = call("measure", tiny_folder, tmp_path / "pickled")
    assert code == 2
    assert "holds pickled weights only" in error


@pytest.mark.usefixtures("nothing_read")
def test_models_that_do_not_fit_together_are_refused(
    call: Call, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = 4 * sum(
        tensor.shape[0] * (tensor.shape[1] if len(tensor.shape) > 1 else 1)
        for tensor in open_source(tiny_folder).tensors.values()
    )
    Memory = namedtuple("Memory", "available")
    monkeypatch.setattr(measuring.psutil, "virtual_memory", lambda: Memory(2 * stored - 1))
    code, out, error = call("measure", tiny_folder, tiny_folder)
    assert (code, out) == (3, "")
    assert "the weights of tiny, tiny (2) in float32 need 0.0 GB on cpu" in error
    assert "measure fewer models at a time" in error
    with pytest.raises(AssertionError, match="a model was loaded"):  # half of them would fit
        measuring.measure([tiny_folder, tiny_folder], dtype="bfloat16", quiet=True)


def test_defaults_shrink_to_a_short_context(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "short")
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 12}))
    report = measuring.measure([tiny_folder, tmp_path / "short"], batches=(1,), rounds=1, memory=False, quiet=True)
    timed = [one for results in report.models for one in results.measurements if one.unit == "tokens/s"]
    assert len(timed) == 4
    assert {(one.protocol["prompt_tokens"], one.protocol["new_tokens"]) for one in timed} == {(9, 3)}


def test_kinds_of_numbers_never_share_a_row() -> None:
    common = {"protocol": {"batch": 1}, "environment": Environment.here()}
    measured = Measurement(
        name="decode_speedup/batch1", value=1.01, low=0.9, high=1.1, n=5, unit="1", how="measured", **common
    )
    measured = measured.model_copy(update={"remark": "no speed-up: zeros are stored dense"})
    estimated = Measurement(name="decode_speedup/batch1", value=1.5, unit="1", how="estimated", **common)
    unknown = Measurement(name="something/new", value=3, unit="1", how="counted", **common)
    models = (
        ModelResults(name="a", model="a", fingerprint="sha256:1", measurements=(measured, unknown)),
        ModelResults(name="b", model="b", fingerprint="sha256:2", measurements=(estimated,)),
    )
    assert list(rows(models)) == [
        ["something/new", "counted", "3.00", "-"],
        ["batch 1", "", "", ""],
        ["decode speed-up", "measured", "1.01\n0.90-1.10\nno speed-up", "-"],
        ["decode speed-up", "estimated", "-", "1.50"],
    ]
    assert remarks(models) == ["a, decode speed-up at batch 1: no speed-up: zeros are stored dense"]
