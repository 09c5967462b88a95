"""What --data means: names, files, mixes and hub ids; without a network everything that needs one fails at once."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from compresso.data import hub, registry
from compresso.data.hub import HubSet
from compresso.data.records import Instruction, Text
from compresso.data.registry import NAMES, REGISTERED, load_records
from compresso.errors import DataError

LOCAL = os.environ.get("COMPRESSO_DATA")
needs_local = pytest.mark.skipif(not LOCAL, reason="COMPRESSO_DATA: no folder with local copies")


@pytest.fixture(autouse=True)
def no_local_copies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "local_copy" not in request.node.name:
        monkeypatch.delenv("COMPRESSO_DATA", raising=False)


@pytest.fixture
def small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the embedded world's two functions."""
    world = types.ModuleType("compresso.data.world")
    world.documents = lambda n, seed: (f"document {i} of {seed}" for i in range(n))  # type: ignore[attr-defined]
    world.instructions = lambda n, seed: ({"instruction": f"{i}", "input": "", "output": f"{seed}"} for i in range(n))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "compresso.data.world", world)
    monkeypatch.setattr("compresso.data.world", world, raising=False)


def test_a_file_is_read_and_described_without_its_folder(write) -> None:
    records = load_records(write("a.jsonl", '{"text": "a"}\n'))
    assert (records.kind, records.rows, records.source, records.n_bad) == ("text", [Text("a")], "a.jsonl", 0)


def test_sources_joined_by_commas_keep_their_order(write) -> None:
    text, instructions = (
        write("a.jsonl", '{"text": "a"}\n'),
        write("b.jsonl", '{"instruction": "b", "output": "c"}\nbroken\n'),
    )
    records = load_records(f"{text}, {instructions}", skip_bad=True)
    assert (records.kind, records.rows, records.source) == (
        "mixed",
        [Text("a"), Instruction("b", "", "c")],
        "a.jsonl + b.jsonl",
    )
    assert records.n_bad == 1 and records.bad[0].startswith(f"{instructions}:2: bad JSON")
    assert records.texts() == ["a"]
    with pytest.raises(DataError, match=r"b\.jsonl:2: bad JSON"):
        load_records(f"{text},{instructions}")


def test_a_file_name_may_hold_a_comma(write) -> None:
    assert load_records(str(write("a,b.jsonl", '{"text": "a"}\n'))).source == "a,b.jsonl"


def test_half_of_the_world_is_text_and_any_beginning_holds_both(small_world: None) -> None:
    records = load_records("world", limit=7, seed=3)
    assert [type(row) for row in records.rows] == [Instruction, Text] * 3 + [Instruction]
    assert records.rows[1] == Text("document 0 of 3")
    assert (
        load_records("world-text", limit=5).kind == "text"
        and load_records("world-instructions", limit=5).kind == "instruction"
    )
    assert len(load_records("world").rows) == registry.WORLD_ROWS
    assert (
        load_records("world", limit=7, seed=3).sha256 == records.sha256 != load_records("world", limit=7, seed=4).sha256
    )


def test_the_real_world_can_be_read() -> None:
    records = load_records("world", limit=6)
    assert records.kind == "mixed" and len(records.rows) == 6


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("alpacca-gpt4", "did you mean 'alpaca-gpt4'?"),
        ("nonsense", "known: alpaca, "),
        ("", "empty source"),
        ("wikitext2,,c4", "empty source"),
        ("missing.jsonl", "missing.jsonl: no such file"),
        ("deep/er/folder", "neither a registered name nor a file"),
    ],
)
def test_what_is_no_data_is_refused(data: str, message: str) -> None:
    with pytest.raises(DataError) as raised:
        load_records(data)
    assert message in str(raised.value)


def test_a_limit_below_one_is_refused(write) -> None:
    with pytest.raises(DataError, match="limit=0"):
        load_records(write("a.txt", "a"), limit=0)


def test_every_registered_name_has_what_is_needed() -> None:
    assert {"alpaca-gpt4", "alpaca-cleaned", "c4", "wikitext2", "world"} <= set(NAMES)
    for known in REGISTERED.values():
        assert known.hub.id.count("/") == 1 and known.columns and known.local and "train" in known.local


def test_hub_rows_become_records(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def rows(place: HubSet, split: str, limit: int | None) -> list[dict]:
        asked.append((place, split, limit))
        return [{"instruction": "a", "input": "", "output": "b", "text": "c", "id": 1}]

    monkeypatch.setattr(hub, "rows", rows)
    assert (
        load_records("alpaca-gpt4").rows
        == [Instruction("a", "", "b")]
        == load_records("owner/name:small", split="test", limit=1).rows
    )
    assert asked == [(REGISTERED["alpaca-gpt4"].hub, "train", None), (HubSet("owner/name", "small"), "test", 1)]
    assert "first 1 rows of owner/name" in load_records("owner/name", limit=1).source
    monkeypatch.setattr(hub, "rows", lambda *_: [{"title": "a"}])
    with pytest.raises(DataError, match="has no column text"):
        load_records("c4")
    with pytest.raises(DataError, match="record 1: fields are: title"):
        load_records("owner/name")


OFFLINE = """
import json, sys
attempts = []
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        attempts.append(event)
        raise OSError("no network here")
sys.addaudithook(watch)
from compresso.data.registry import load_records
from compresso.errors import DataError
try:
    load_records(sys.argv[1])
    message = ""
except DataError as error:
    message = str(error)
print(json.dumps([message, len(attempts)]))
"""


def offline(data: str, cache: Path, **environment: str) -> tuple[str, int]:
    """The error message of a fresh process in which every connection fails, and how many it tried."""
    names = {
        name: value
        for name, value in os.environ.items()
        if not name.upper().endswith("_PROXY") and name != "COMPRESSO_DATA"
    }
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, data],
        env=names
        | {"HF_HOME": str(cache), "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    message, attempts = json.loads(done.stdout.splitlines()[-1])
    return message, attempts


@pytest.mark.slow
def test_with_the_hub_switched_off_no_connection_is_tried(tmp_path: Path) -> None:
    message, attempts = offline("alpaca-gpt4", tmp_path, HF_HUB_OFFLINE="1")
    assert attempts == 0
    assert "vicgalle/alpaca-gpt4" in message and "HF_HUB_OFFLINE is set" in message and "pass a local file" in message


@pytest.mark.slow
def test_without_a_network_the_hub_is_asked_once(tmp_path: Path) -> None:
    message, attempts = offline("wikitext2", tmp_path, HF_HUB_OFFLINE="0")
    assert 1 <= attempts <= 2
    assert "Salesforce/wikitext (wikitext-2-raw-v1), split 'train'" in message and "did not answer" in message


@pytest.mark.slow
def test_local_data_needs_no_connection(write) -> None:
    assert offline(str(write("a.txt", "a")), write("a.txt", "a").parent) == ("", 0)


@needs_local
@pytest.mark.parametrize("name", list(REGISTERED))
def test_a_local_copy_stands_in_and_is_named(name: str) -> None:
    copies = REGISTERED[name].local or {}
    for split, copy in copies.items():
        records = load_records(name, split=split, limit=20)
        assert len(records.rows) == 20 and Path(copy.file).name in records.source and copy.remark in records.source
        assert records.kind == ("instruction" if name.startswith("alpaca") else "text")
