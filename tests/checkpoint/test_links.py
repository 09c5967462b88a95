"""Links in a model folder: those of the hub's cache are its own, wherever its blobs lie; others need a word of their
owner, and the refusal names where they lead.
"""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from compresso.checkpoint.code import trusted
from compresso.checkpoint.links import ALLOWED, is_own
from compresso.checkpoint.load import load_model
from compresso.checkpoint.source import open_source
from compresso.checkpoint.tokenizer import load_tokenizer
from compresso.data import nano
from compresso.errors import CheckpointError

TINY = {
    "vocab_size": 1024,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of a model on a disk of their own."""
    monkeypatch.delenv(ALLOWED, raising=False)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(tmp_path / "disk")
    AutoTokenizer.from_pretrained(nano.path()).save_pretrained(tmp_path / "disk")
    (tmp_path / "disk" / "LICENSE").write_text("anybody may")
    return tmp_path / "disk"


def linked(disk: Path, folder: Path) -> Path:
    """A folder of links to the files on the disk."""
    folder.mkdir(parents=True)
    for file in disk.iterdir():
        (folder / file.name).symlink_to(file)
    return folder


def opens(folder: Path) -> None:
    source = open_source(folder)
    load_model(source)
    load_tokenizer(source)
    assert trusted(folder) is False


@pytest.mark.parametrize("step", ["blobs", "repository", "snapshots", "snapshot", "cache"])
def test_a_cached_repository_opens_whichever_step_is_a_link(step: str, disk: Path, tmp_path: Path) -> None:
    """As people move a cache to another disk, whole or in part."""
    repository = tmp_path / "hub" / "models--a--b"
    snapshot = repository / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(disk.iterdir())):
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
        file.rename(disk / str(number))
    shutil.move(disk, repository / "blobs")
    moved = {
        "blobs": repository / "blobs",
        "repository": repository,
        "snapshots": repository / "snapshots",
        "snapshot": snapshot,
        "cache": tmp_path / "hub",
    }[step]
    shutil.move(moved, tmp_path / "elsewhere")
    moved.symlink_to(tmp_path / "elsewhere")
    if step in ("snapshots", "snapshot"):  # their links are relative: they lead out of wherever they lie now
        with pytest.raises(CheckpointError, match=r"is a link to ../../blobs/\d+, and nothing lies there"):
            open_source(snapshot)
        return
    opens(snapshot)
    (tmp_path / "secret.json").write_text("{}")
    (snapshot / "tokenizer_config.json").unlink()
    (snapshot / "tokenizer_config.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(CheckpointError, match=rf"leads out of the model folder, to {tmp_path / 'secret.json'}"):
        open_source(snapshot)


def test_links_of_one_s_own_open_where_their_disk_is_named(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = linked(disk, tmp_path / "mine")
    with pytest.raises(CheckpointError, match=rf"to {disk}/\S+ Copy the file into it; or, .* set {ALLOWED}={disk}\."):
        open_source(mine)
    monkeypatch.setenv(ALLOWED, f"{tmp_path / 'other'}:{disk}")
    opens(mine)
    monkeypatch.setenv(ALLOWED, str(tmp_path / "other"))
    with pytest.raises(CheckpointError, match="leads out of the model folder"):
        open_source(mine)


@pytest.mark.parametrize("name", ["tokenizer.model", "LICENSE", "NOTICE.txt", "README.md", "source.spm", "x.jinja"])
def test_what_is_read_or_carried_over_must_not_lead_out(name: str, disk: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("xyzzy")
    (disk / name).unlink(missing_ok=True)
    (disk / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=f"{name} leads out of the model folder"):
        open_source(disk)


def test_templates_in_their_folder_must_not_lead_out(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("xyzzy")
    (disk / "additional_chat_templates").mkdir()
    (disk / "additional_chat_templates" / "tool.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"tool\.jinja leads out of the model folder"):
        open_source(disk)


@pytest.mark.parametrize(
    ("target", "said"),
    [("nowhere", "is a link to nowhere, and nothing lies there"), ("tokenizer.json", "leads to no file")],
)
def test_a_link_that_leads_to_nothing_is_called_that(target: str, said: str, disk: Path) -> None:
    (disk / "tokenizer.json").unlink()
    (disk / "tokenizer.json").symlink_to(target)
    with pytest.raises(CheckpointError, match=said) as raised:
        open_source(disk)
    assert "\n" not in str(raised.value)


def test_a_link_inside_the_folder_is_fine(disk: Path) -> None:
    (disk / "kept").mkdir()
    (disk / "tokenizer.json").rename(disk / "kept" / "tokenizer.json")
    (disk / "tokenizer.json").symlink_to("kept/tokenizer.json")
    opens(disk)
    assert is_own((disk / "tokenizer.json").resolve(), disk)
