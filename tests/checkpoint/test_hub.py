"""Hub names without a network: the cache at once, or an error that says what to do; what the hub offers is judged
before downloading.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, constants
from transformers import LlamaConfig, LlamaForCausalLM

from compresso.checkpoint import hub
from compresso.checkpoint.load import load_model
from compresso.checkpoint.source import open_source
from compresso.errors import CheckpointError
from tests.checkpoint.test_gguf_header import FIELDS, SHAPES, file_of

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a hub that refuses connections."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # `make test` sets it; each test says what it wants
    return tmp_path


def put_in_cache(cache: Path) -> None:
    """A tiny model as the hub client stores one: links from a snapshot into the blobs."""
    repository = cache / "models--owner--tiny"
    snapshot = repository / "snapshots" / REVISION
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(REVISION)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(snapshot)
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(repository / "blobs" / str(number))
        path.symlink_to(f"../../blobs/{number}")


@pytest.mark.parametrize("offline", [True, False])
def test_cached_model_opens_without_network(offline: bool, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    put_in_cache(cache)
    source = open_source("owner/tiny")
    assert (source.kind, source.name, source.revision) == ("hub", "owner/tiny", REVISION)
    assert source.identity.name == "owner/tiny"
    assert load_model(source).config.hidden_size == 16


@pytest.mark.parametrize(
    ("offline", "why"), [(True, "HF_HUB_OFFLINE is set"), (False, r"the hub did not answer \(ConnectError\)")]
)
def test_model_that_is_nowhere(offline: bool, why: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(
        CheckpointError, match=f"'owner/absent' is neither a local folder nor in the hub cache, and {why}"
    ):
        open_source("owner/absent")


def put_gguf_in_cache(cache: Path, *names: str) -> None:
    """GGUF files as the hub client stores them; the newest revision has no other."""
    repository = cache / "models--owner--packed"
    snapshot = repository / "snapshots" / REVISION
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(REVISION)
    snapshot.mkdir(parents=True)
    for number, name in enumerate(names):
        (repository / "blobs" / f"{number:064}").write_bytes(file_of(FIELDS, SHAPES))
        (snapshot / name).symlink_to(f"../../blobs/{number:064}")


@pytest.mark.parametrize("offline", [True, False])
def test_cached_gguf_opens_by_its_id(offline: bool, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    put_gguf_in_cache(cache, "tiny.Q8_0.gguf")
    source = open_source("owner/packed")
    assert (source.kind, source.name, source.revision) == ("gguf", "tiny.Q8_0", REVISION)
    assert load_model(source).config.hidden_size == 8
    named = open_source("owner/packed/tiny.Q8_0.gguf")
    assert (named.identity, named.revision) == (source.identity, REVISION)
    assert open_source("owner/packed", weights=False).config.hidden_size == 8


def test_one_of_several_cached_ggufs_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    put_gguf_in_cache(cache, "a.gguf", "b.gguf")
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF files: a\.gguf, b\.gguf\. Give one of them"):
        open_source("owner/packed")
    assert open_source("owner/packed/b.gguf").name == "b"
    with pytest.raises(CheckpointError, match=r"c\.gguf of hub model owner/packed is not in the hub cache"):
        open_source("owner/packed/c.gguf")
    snapshot = cache / "models--owner--packed/snapshots" / REVISION
    (cache / "secret").write_bytes(file_of(FIELDS, SHAPES))
    (snapshot / "c.gguf").symlink_to("../../../secret")
    with pytest.raises(CheckpointError, match="leads out of the model folder"):
        open_source("owner/packed/c.gguf")


@pytest.mark.parametrize(
    ("name", "files", "wanted"),
    [
        ("owner/packed", ["README.md", "tiny.gguf"], ["tiny.gguf"]),
        ("owner/packed/b.gguf", ["a.gguf", "b.gguf"], ["b.gguf"]),
    ],
)
def test_only_the_gguf_that_is_asked_for_is_fetched(
    name: str, files: list[str], wanted: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    (cache / wanted[0]).write_bytes(file_of(FIELDS, SHAPES))
    siblings = [SimpleNamespace(rfilename=one) for one in files]
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: SimpleNamespace(sha=REVISION, siblings=siblings))
    monkeypatch.setattr(
        hub, "snapshot_download", lambda *_, allow_patterns, **__: asked.append(allow_patterns) or str(cache)
    )
    assert open_source(name).name == wanted[0].removesuffix(".gguf")
    assert asked == [wanted]


def test_ggufs_on_the_hub_of_which_one_must_be_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    siblings = [SimpleNamespace(rfilename=one) for one in ("a.gguf", "b.gguf")]
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: SimpleNamespace(sha=REVISION, siblings=siblings))
    with pytest.raises(CheckpointError, match=r"name one of them: owner/packed/a\.gguf, owner/packed/b\.gguf"):
        open_source("owner/packed", weights=False)
    with pytest.raises(CheckpointError, match=r"hub model owner/packed has no c\.gguf \(files: a\.gguf, b\.gguf\)"):
        open_source("owner/packed/c.gguf")


def test_link_in_the_cache_that_leaves_its_repository(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    put_in_cache(cache)
    (cache / "secret").write_text("{}")
    (cache / "models--owner--tiny/snapshots" / REVISION / "tokenizer.json").symlink_to("../../../secret")
    with pytest.raises(CheckpointError, match="leads out of the model folder"):
        open_source("owner/tiny")


def test_pickles_on_the_hub_are_not_fetched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    siblings = [SimpleNamespace(rfilename="config.json"), SimpleNamespace(rfilename="pytorch_model.bin")]
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: SimpleNamespace(sha=REVISION, siblings=siblings))
    with pytest.raises(CheckpointError, match=r"no safetensors weights \(files: config\.json, pytorch_model\.bin\)"):
        open_source("owner/tiny")
    assert list(cache.iterdir()) == []


def test_only_what_is_needed_is_fetched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    siblings = [SimpleNamespace(rfilename="model.safetensors")]
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: SimpleNamespace(sha=REVISION, siblings=siblings))
    monkeypatch.setattr(
        hub, "snapshot_download", lambda *_, allow_patterns, **__: asked.append(allow_patterns) or str(cache)
    )
    assert hub.fetch("owner/tiny") == (cache, REVISION)
    hub.fetch("owner/tiny", weights=False)
    assert [("*.safetensors" in patterns) for patterns in asked] == [True, False]
    assert not any(pattern.endswith((".py", ".bin", "*")) for patterns in asked for pattern in patterns)


@pytest.mark.parametrize(
    ("name", "possible"),
    [("gpt2", True), ("owner/name-1.0", True), ("a/b/c", False), ("../x", False), ("x.json", False), ("", False)],
)
def test_hub_names(name: str, possible: bool) -> None:
    assert hub.is_hub_name(name) == possible
