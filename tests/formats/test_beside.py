"""What lies beside the weights: nothing of the loading machine is added, nothing of the model's folder is lost, and
both generations of readers find a tokenizer that they know.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from compresso.arch.base import arch_for
from compresso.checkpoint.load import load_model
from compresso.checkpoint.overwrite import RUN, refuse_foreign
from compresso.checkpoint.source import open_source
from compresso.checkpoint.tokenizer import load_tokenizer
from compresso.data import nano
from compresso.errors import CheckpointError
from compresso.formats.hf import save_checkpoint
from tests.conftest import Ran

TINY = {
    "vocab_size": 1024,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
KEPT = {
    "LICENSE": "do what is right",
    "NOTICE.txt": "made by somebody",
    "Use_Policy.md": "be kind",
    "tokenizer.model": "pieces",
    "added_tokens.json": "{}",
    "special_tokens_map.json": '{"eos_token": {"content": "</s>", "lstrip": false}, "pad_token": "<pad>"}',
}
LEFT = {"license.py": "print(1)", "README.md": "# old", "pytorch_model.bin": "x", "notes.docx": "x"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model as version 4 wrote it, with what people put beside weights."""
    folder = tmp_path / "given"
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(nano.path()).save_pretrained(folder)
    for name, text in (KEPT | LEFT).items():
        (folder / name).write_text(text)
    config = json.loads((folder / "config.json").read_text())
    config.pop("use_cache")
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": "/home/somebody/model", "note": "mine"}))
    edited(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast", add_bos_token=False, legacy=False)
    edited(folder / "generation_config.json", temperature=0.7, do_sample=True, of_the_house=3, stop_words=[5])
    (folder / "preprocessor_config.json").write_text('{"size": 3, "auto_map": {"AutoProcessor": "x.Y"}}')
    return folder


def edited(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def saved(folder: Path, output: Path, **changed: Any) -> Path:
    source = open_source(folder)
    model, tokenizer = load_model(source), load_tokenizer(source)
    for name, value in changed.items():
        setattr(tokenizer, name, value)
    save_checkpoint(model, arch_for(model.config).shapes(model), output, tokenizer=tokenizer, source=folder)
    return output


def test_licences_notices_and_tokenizer_files_go_with_the_weights(folder: Path, tmp_path: Path) -> None:
    output = saved(folder, tmp_path / "out")
    for name, text in KEPT.items():
        assert (output / name).read_text() == text
    assert not any((output / name).exists() for name in LEFT)
    assert read(output / "preprocessor_config.json") == {"size": 3}  # what names code stays behind
    (output / "records.json").write_text('{"format": 3, "recipe": {}, "stages": {}}')
    refuse_foreign(output, RUN)  # all of it may be replaced by the next run


def test_the_config_says_what_the_folder_said_and_nothing_of_the_machine(folder: Path, tmp_path: Path) -> None:
    config = read(saved(folder, tmp_path / "out") / "config.json")
    assert config["note"] == "mine" and config["torch_dtype"] == config["dtype"] == "float32"
    assert not {"use_cache", "_name_or_path", "attn_implementation", "_attn_implementation"} & config.keys()
    edited(folder / "config.json", use_cache=False)
    assert read(saved(folder, tmp_path / "other") / "config.json")["use_cache"] is False


def test_a_generation_config_loses_no_field(folder: Path, tmp_path: Path) -> None:
    found = read(saved(folder, tmp_path / "out") / "generation_config.json")
    assert (found["temperature"], found["do_sample"], found["of_the_house"], found["stop_words"]) == (0.7, True, 3, [5])


def test_the_tokenizer_has_a_class_that_both_generations_know(folder: Path, tmp_path: Path) -> None:
    output = saved(folder, tmp_path / "out")
    config = read(output / "tokenizer_config.json")
    assert config["tokenizer_class"] == "LlamaTokenizerFast"  # its own
    assert (config["add_bos_token"], config["legacy"]) == (False, False)  # which version 5 drops
    assert not {"is_local", "local_files_only", "backend", "name_or_path"} & config.keys()
    edited(folder / "tokenizer_config.json", tokenizer_class="TokenizersBackend", extra_special_tokens=["<a>", "<b>"])
    config = read(saved(folder, tmp_path / "other") / "tokenizer_config.json")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<a>", "<b>"] and "extra_special_tokens" not in config
    text = "A fox of 42 years <a>"
    again, before = (AutoTokenizer.from_pretrained(one) for one in (tmp_path / "other", folder))
    assert again(text)["input_ids"] == before(text)["input_ids"]
    assert set(again.all_special_tokens) == set(before.all_special_tokens)


def test_special_tokens_with_names_of_their_own_keep_them(folder: Path, tmp_path: Path) -> None:
    described = folder / "tokenizer_config.json"
    edited(described, extra_special_tokens={"image_token": "<s>"}, additional_special_tokens=["<pad>"])
    for source, output in ((folder, tmp_path / "once"), (tmp_path / "once", tmp_path / "twice")):
        config = read(saved(source, output) / "tokenizer_config.json")
        assert config["extra_special_tokens"] == {"image_token": "<s>"}  # a mapping, as older readers want it
        assert config["additional_special_tokens"] == ["<pad>"]
        assert AutoTokenizer.from_pretrained(output).image_token == "<s>"


def test_a_token_that_the_run_changed_is_named_everywhere(folder: Path, tmp_path: Path) -> None:
    output = saved(folder, tmp_path / "out", pad_token="</s>")
    assert read(output / "special_tokens_map.json")["pad_token"] == "</s>"
    assert read(output / "tokenizer_config.json")["pad_token"] == "</s>"
    assert AutoTokenizer.from_pretrained(output).pad_token == "</s>"


def test_files_that_number_tokens_stay_behind_where_the_numbers_changed(folder: Path, tmp_path: Path) -> None:
    edited(folder / "config.json", vocab_size=1024)
    source = open_source(folder)
    model, tokenizer = load_model(source), load_tokenizer(source)
    model.resize_token_embeddings(1000)
    save_checkpoint(model, arch_for(model.config).shapes(model), tmp_path / "out", tokenizer=tokenizer, source=folder)
    assert not (tmp_path / "out" / "tokenizer.model").exists()
    assert (tmp_path / "out" / "LICENSE").is_file()
    generation = read(tmp_path / "out" / "generation_config.json")
    assert generation["of_the_house"] == 3 and "stop_words" not in generation


def test_files_of_the_hub_s_cache_are_followed_into_its_blobs(folder: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0", tmp_path / "models--a--b" / "blobs"
    snapshot.parent.mkdir(parents=True)
    blobs.mkdir()
    folder.rename(snapshot)
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("..", "..", "blobs", str(number)))
    output = saved(snapshot, tmp_path / "out")
    assert (output / "LICENSE").read_text() == KEPT["LICENSE"] and not (output / "LICENSE").is_symlink()
    assert (output / "tokenizer.model").read_text() == KEPT["tokenizer.model"]


def test_links_out_of_the_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of the machine")
    (folder / "LICENSE").unlink()
    (folder / "LICENSE").symlink_to(secret)
    with pytest.raises(CheckpointError, match="LICENSE leads out of the model folder"):
        saved(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_file_of_a_run_has_the_mode_that_umask_asks_for(ran: Ran, tiny_folder: Path) -> None:
    before = os.umask(0)
    os.umask(before)
    output = ran("magnitude-structured", sets=()).folder
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in output.rglob("*") if path.is_file()}
    assert modes and set(modes.values()) == {0o666 & ~before}


@pytest.mark.slow
def test_a_run_carries_the_rest_over_and_its_card_names_the_readers(
    folder: Path, instructions: Path, tmp_path: Path, quick_reopening: None
) -> None:
    from compresso.runner.run import run

    recipe = {"name": "r", "title": "t", "description": "d", "stages": [{"magnitude_structured": {"keep": 0.7}}]}
    result = run(recipe, folder, output=tmp_path / "out", layout="padded", quiet=True)
    assert (result.folder / "LICENSE").read_text() == KEPT["LICENSE"]
    assert "and 4.57 where it knows model_type llama" in (result.folder / "README.md").read_text()
    result = run(recipe, folder, output=tmp_path / "native", layout="native", quiet=True)
    assert "transformers 5 opens it; older versions do not" in (result.folder / "README.md").read_text()
