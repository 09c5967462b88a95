"""Opening a model: each kind of bad folder is refused with its cure before weights are read,
and nothing in it is run.
"""

import json
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compresso.checkpoint import source as source_module
from compresso.checkpoint import tokenizer_files
from compresso.checkpoint.load import load_model, meta_model
from compresso.checkpoint.source import open_source
from compresso.checkpoint.tokenizer import load_tokenizer
from compresso.errors import ArchError, CheckpointError, NumericError

TINY = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": 1,
}


def tiny(**fields: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY | fields))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tiny().save_pretrained(tmp_path / "model", max_shard_size=4_000)
    return tmp_path / "model"


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def refused(model: Path | str, message: str) -> None:
    """The model is refused in one line, without building it, with exit code 2."""
    with pytest.raises(CheckpointError, match=message) as raised:
        open_source(model)
    assert "\n" not in str(raised.value)
    assert raised.value.exit_code == 2


class Touch:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


_opened: list[str] | None = None


def _record(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], str | bytes):
        _opened.append(str(arguments[0]))


sys.addaudithook(_record)


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Paths of all files opened by Python code while the test runs."""
    global _opened
    _opened = []
    yield _opened
    _opened = None


def test_local_folder(folder: Path) -> None:
    source = open_source(folder)
    assert (source.kind, source.name, source.folder) == ("folder", "model", folder)
    assert source.tensors["lm_head.weight"].shape == (31, 16)
    model = load_model(source)
    assert not model.training
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), tiny().parameters(), strict=True))
    assert load_model(source, dtype=torch.bfloat16).dtype == torch.bfloat16
    shapes = {name: parameter.shape for name, parameter in meta_model(source).named_parameters()}
    assert shapes == {name: parameter.shape for name, parameter in model.named_parameters()}


def test_shards_and_stored_dtype(tmp_path: Path) -> None:
    tiny().to(torch.float16).save_pretrained(tmp_path / "model", max_shard_size=2_000)
    source = open_source(str(tmp_path / "model"))
    assert len({tensor.file for tensor in source.tensors.values()}) > 2
    assert load_model(source).dtype == torch.float16


def test_config_alone(folder: Path) -> None:
    for source in (open_source(folder / "config.json"), open_source(folder, weights=False)):
        assert source.tensors == {}
        assert sum(parameter.numel() for parameter in meta_model(source).parameters()) == sum(
            p.numel() for p in tiny().parameters()
        )
        assert {parameter.device.type for parameter in meta_model(source).parameters()} == {"meta"}
        with pytest.raises(CheckpointError, match="without weights"):
            load_model(source)


def test_not_a_model(tmp_path: Path, folder: Path) -> None:
    refused(tmp_path / "absent", "does not exist")
    refused("./absent", "does not exist")
    refused("absent/config.json", "does not exist")
    refused("a/../b", "does not exist")
    refused(folder / "model.safetensors", "is a file; give the folder it lies in, a GGUF file")
    refused(tmp_path, r"has no config\.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ('{"model_type": "llama"', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        (
            '{"model_type": "llama", "rms_norm_eps": NaN}',
            r"config\.json: rms_norm_eps is nan; a finite number is wanted\. C",
        ),
        ("[1]", "holds a list"),
        ("{}", "has no model_type"),
        ('{"model_type": 7}', "has no model_type"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "not a valid llama config"),
        ('{"model_type": "llama", "hidden_size": 10, "num_attention_heads": 3}', "not a valid llama config"),
        (
            '{"model_type": "llama", "num_hidden_layers": 1000000000}',
            "num_hidden_layers is 1,000,000,000; at most 512 layers",
        ),
        (
            '{"model_type": "llama", "hidden_size": 1099511627776, "num_hidden_layers": 1}',
            "hidden_size is 1,099,511,627,776; at most 262,144",
        ),
        (
            '{"model_type": "llama", "num_hidden_layers": 1, "rope_parameters": {"rope_type": "?"}}',
            "cannot be built|not a valid",
        ),
        ('{"x": "' + "x" * 5_000_000 + '"}', "at most 4000000 are read"),
    ],
)
def test_bad_config(text: str, message: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    refused(folder, message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pad_token_id": "x"}, "pad_token_id is 'x'; a token's number is wanted"),
        ({"pad_token_id": 0.5}, "pad_token_id is 0.5; a token's number is wanted"),
        ({"eos_token_id": [1, {}]}, r"eos_token_id is \[1, {}\]; a token's number is wanted"),
        ({"early_stopping": []}, "is no valid generation config: unhashable"),
        ({"watermarking_config": "x"}, "is no valid generation config"),
    ],
)
def test_a_bad_generation_config(fields: dict[str, Any], message: str, folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps(fields))
    refused(folder, message)
    (folder / "generation_config.json").unlink()
    open_source(folder)


def test_config_that_asks_for_too_much(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=1_000_000)
    with pytest.raises(CheckpointError, match="num_hidden_layers is 1,000,000; at most 512 layers are built"):
        meta_model(open_source(folder / "config.json"))
    edit_config(folder, num_hidden_layers=2, quantization_config={"quant_method": "gptq"})
    refused(folder, "quantised")
    edit_config(folder, quantization_config=None, transformers_weights="../other.safetensors")
    refused(folder, "names another weight file")


def test_lora_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/other"}')
    refused(folder, "Merge it into its base model")


def test_not_a_language_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(
        ArchError, match=r"resnet with no architecture is not opened\. Give a causal language model, or an encoder"
    ):
        meta_model(open_source(tmp_path / "config.json"))
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertForTokenClassification"]}')
    with pytest.raises(ArchError, match="bert with the architecture BertForTokenClassification is not opened"):
        meta_model(open_source(tmp_path / "config.json"))


@pytest.mark.parametrize(
    ("kind", "named", "opened"),
    [
        ("bert", None, "BertModel"),
        ("bert", "BertForMaskedLM", "BertForMaskedLM"),
        ("bert", "BertForSequenceClassification", "BertForSequenceClassification"),
        ("bert", "BertForQuestionAnswering", "BertForQuestionAnswering"),
        ("roberta", None, "RobertaModel"),
        ("roberta", "RobertaForMaskedLM", "RobertaForMaskedLM"),
        ("distilbert", None, "DistilBertModel"),
        ("distilbert", "DistilBertForSequenceClassification", "DistilBertForSequenceClassification"),
        ("vit", None, "ViTModel"),
        ("vit", "ViTForImageClassification", "ViTForImageClassification"),
        ("opt", None, "OPTForCausalLM"),
        ("gemma2", "Gemma2ForCausalLM", "Gemma2ForCausalLM"),
    ],
)
def test_the_config_names_the_class(tmp_path: Path, kind: str, named: str | None, opened: str) -> None:
    config = {"model_type": kind} | ({"architectures": [named]} if named else {})
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(meta_model(open_source(tmp_path / "config.json"))).__name__ == opened


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "model.pkl", "model.ckpt"])
def test_pickles_are_not_opened(name: str, folder: Path, opened: list[str]) -> None:
    canary = folder.parent / "ran"
    (folder / name).write_bytes(pickle.dumps(Touch(canary)))
    opened.clear()
    load_model(open_source(folder))  # beside safetensors it is ignored
    (folder / "model.safetensors").unlink()
    refused(folder, f"pickled weights only \\({name}\\).*Convert it once")
    assert not canary.exists()
    assert not [path for path in opened if path.endswith(name)]
    (folder / name).unlink()
    refused(folder, r"neither model\.safetensors nor")


def test_an_onnx_export_is_called_one(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.onnx")
    refused(folder, r"model is an ONNX export\. Give the folder that it was made from\.$")


def test_code_in_the_folder_is_not_run(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    canary = folder.parent / "ran"
    (folder / "modeling_x.py").write_text(f"open({str(canary)!r}, 'w')\nclass X: pass\n")
    names = {
        "AutoConfig": "modeling_x.X",
        "AutoModelForCausalLM": "modeling_x.X",
        "AutoTokenizer": ["modeling_x.X", None],
    }
    edit_config(folder, auto_map=names)
    inner = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(folder)
    source = open_source(folder)  # a model type that transformers knows
    load_model(source)
    load_tokenizer(source)
    edit_config(folder, model_type="x")
    refused(folder, r"does not know model_type 'x' and wants to run code of its own \(auto_map\)")
    refused(folder / "config.json", "auto_map")
    edit_config(folder, model_type="llama")
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps(
            json.loads(path.read_text())
            | {
                "tokenizer_class": "X",
                "auto_map": {"AutoTokenizer": ["modeling_x.X", None]},
            }
        )
    )
    try:
        load_tokenizer(open_source(folder))
    except CheckpointError as error:
        assert "tokenizer of model" in str(error)  # either outcome is fine, running the code is not
    assert not canary.exists()


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "/etc/outside.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "x.bin",
        ".safetensors",
    ],
)
def test_index_stays_in_the_folder(shard: str, sharded: Path, opened: list[str]) -> None:
    shutil.copy(next(sharded.glob("model-*.safetensors")), sharded.parent / "outside.safetensors")
    index = sharded / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["lm_head.weight"] = shard
    index.write_text(json.dumps(data))
    opened.clear()
    refused(sharded, "only safetensors files in the same folder are read")
    assert not [path for path in opened if "outside" in path]


def test_index_that_does_not_match(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    good = index.read_text()
    data = json.loads(good)
    victim = data["weight_map"]["lm_head.weight"]
    (sharded / victim).rename(sharded / "kept")
    refused(sharded, f"names {victim}, which is missing")
    (sharded / "kept").rename(sharded / victim)
    index.write_text(json.dumps({"weight_map": data["weight_map"] | {"extra": victim}}))
    refused(sharded, f"says that 'extra' is in {victim}; it is not")
    index.write_text(json.dumps({"weight_map": ["x"]}))
    refused(sharded, "no weight_map")
    index.write_text(good)
    other = next(name for name in data["weight_map"].values() if name != victim)
    shutil.copy(sharded / victim, sharded / other)
    refused(sharded, "is in .* too")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_links_out_of_the_folder(name: str, folder: Path, opened: list[str]) -> None:
    outside = folder.parent / "outside"
    outside.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"{}")
    opened.clear()
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    refused(folder, "leads out of the model folder")
    assert not [path for path in opened if "outside" in path]


def test_link_to_the_folder_itself_is_fine(folder: Path) -> None:
    (folder.parent / "link").symlink_to(folder)
    load_model(open_source(folder.parent / "link"))


def test_truncated_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, r"model\.safetensors cannot be read: .*truncated")


def test_tensors_are_compared_with_the_architecture(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["surplus"] = tensors.pop("model.norm.weight")
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:, :-1].contiguous()
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(24, 16, dtype=torch.int8)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # in files of old, and harmless

    edit_tensors(folder, change)
    refused(
        folder,
        r"missing: model\.norm\.weight; unexpected: surplus; wrong shape: lm_head\.weight \[31, 15\] instead of \[31,"
        r" 16\]; "
        r"not plain floats: model\.layers\.0\.mlp\.up_proj\.weight I8\.",
    )


def test_many_missing_tensors_stay_on_one_line(folder: Path) -> None:
    tiny(num_hidden_layers=4).save_pretrained(folder)
    edit_tensors(
        folder,
        lambda tensors: [
            tensors.pop(name) for name in list(tensors) if name.startswith(("model.layers.0", "model.layers.1"))
        ],
    )
    refused(folder, "missing: .* and 10 more")


def test_tied_head_may_be_absent(tmp_path: Path, folder: Path) -> None:
    tiny(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    source = open_source(tmp_path / "tied")
    assert "lm_head.weight" not in source.tensors
    load_model(source)
    edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    refused(folder, r"missing: lm_head\.weight")


def test_other_architectures_are_never_filled_with_random_numbers(tmp_path: Path) -> None:
    GPT2LMHeadModel(
        GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=1, eos_token_id=1)
    ).save_pretrained(tmp_path)
    load_model(open_source(tmp_path))
    edit_tensors(tmp_path, lambda tensors: tensors.pop("transformer.ln_f.weight"))
    with pytest.raises(CheckpointError, match=r"missing: transformer\.ln_f\.weight"):
        load_model(open_source(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_named(dtype: torch.dtype, value: float, folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name] = tensors[name].to(dtype)
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value

    edit_tensors(folder, change)
    source = open_source(folder)
    with pytest.raises(NumericError, match=r"'model\.layers\.1\.mlp\.down_proj\.weight' holds NaN or Inf") as raised:
        load_model(source)
    assert raised.value.exit_code == 4


@pytest.mark.parametrize("limit", [0, 1 << 40])
def test_identity(limit: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "_FULL_HASH_BELOW", limit)
    before = open_source(folder).identity
    assert before.name == "model"
    assert before.fingerprint.startswith("sha256:" if limit else "sampled-sha256:")
    assert str(folder.parent) not in str(before)
    assert open_source(folder).identity == before
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].add_(1))
    weights = open_source(folder).identity
    edit_config(folder, rope_theta=5e5)
    assert len({before, weights, open_source(folder).identity}) == 3


def test_tokenizer(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_tokenizer(open_source(folder))
    inner = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(folder)
    assert load_tokenizer(open_source(folder))("b").input_ids == [1]
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer of model cannot be loaded"):
        load_tokenizer(open_source(folder))


def test_unreadable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    refused(folder, "cannot be read: Permission denied")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.model", b"\x0a\x0e\x0a\x05<unk>", "is a sentencepiece model.* pip install sentencepiece protobuf"),
        ("spiece.model", b"\x0a\x0e\x0a\x05<unk>", "is a sentencepiece model.* pip install sentencepiece protobuf"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "is a tiktoken vocabulary.* pip install tiktoken"),
        ("qwen.tiktoken", b"IQ== 0\nIg== 1\n", "is a tiktoken vocabulary.* pip install tiktoken"),
        ("tekken.json", b"{}", "is a tokenizer of mistral-common.* pip install mistral-common"),
    ],
)
def test_a_tokenizer_file_is_named_with_the_package_that_reads_it(
    name: str, content: bytes, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / name).write_bytes(content)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    monkeypatch.setattr(tokenizer_files, "_here", lambda module: False)
    with pytest.raises(CheckpointError, match=f"tokenizer of model cannot be loaded: .*{name} {said}") as raised:
        load_tokenizer(open_source(folder))
    assert "\n" not in str(raised.value)
    monkeypatch.setattr(tokenizer_files, "_here", lambda module: True)
    with pytest.raises(CheckpointError, match=r"tokenizer of model cannot be loaded: .*copy tokenizer\.json"):
        load_tokenizer(open_source(folder))


def test_a_tokenizer_without_its_vocabulary_is_refused(folder: Path) -> None:
    """transformers builds it of three tokens, and every text has no ids."""
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(CheckpointError, match=r"reads tokenizer\.model, which the folder has not; copy tokenizer"):
        load_tokenizer(open_source(folder))


def test_a_rule_of_a_config_class_is_said_without_its_frame(folder: Path) -> None:
    edit_config(folder, hidden_size=10, num_attention_heads=3)
    refused(folder, r"not a valid llama config: The hidden size \(10\) is not a multiple of")
