"""Data that the dense model writes: settings in a name, a cache, the same windows after an interruption, a run."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import compresso
from compresso.checkpoint.source import open_source
from compresso.errors import DataError
from compresso.runner import generated
from compresso.runner.generated import Sampling, parsed, with_generated, write


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMPRESSO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=[2, 3],
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 1)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_first_tokens_are_drawn_then_most_probable_then_sampled() -> None:
    model = tiny()
    windows = write(model, Sampling(tokens=12, greedy=3, temperature=2.0), 40, torch.Generator().manual_seed(0))
    assert windows.shape == (40, 12) and not set(windows.flatten().tolist()) & {0, 1, 2, 3}
    assert len(windows[:, 0].unique()) > 15
    with torch.no_grad():
        logits = model(input_ids=windows).logits
    logits[..., :4] = -torch.inf
    best = logits.argmax(-1)[:, :-1]
    assert torch.equal(windows[:, 1:4], best[:, :3])
    assert (windows[:, 4:] != best[:, 3:]).float().mean() > 0.5


def test_a_low_temperature_is_greedy_and_seeds_differ() -> None:
    model = tiny()

    def windows(temperature: float, seed: int) -> torch.Tensor:
        how = Sampling(tokens=8, greedy=0, temperature=temperature)
        return write(model, how, 4, torch.Generator().manual_seed(seed))

    assert torch.equal(windows(1.0, 0), windows(1.0, 0)) and not torch.equal(windows(1.0, 0), windows(1.0, 1))
    cold = windows(0.01, 0)
    assert torch.equal(cold, write(model, Sampling(tokens=8, greedy=7), 4, torch.Generator().manual_seed(0)))


def test_what_is_written_is_kept_and_goes_on_after_an_interruption(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "generated:examples=40:tokens=6"
    source, plain, calls = open_source(folder), generated.write, list[int]()

    def counted(*given: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*given)  # pyright: ignore

    monkeypatch.setattr(generated, "write", counted)
    with pytest.raises(KeyboardInterrupt):
        with_generated(name, source)
    assert len(list(cache.glob("*.parts/*.safetensors"))) == 2
    cut = with_generated(f"rows.jsonl, {name}", source).removeprefix("rows.jsonl,")
    assert len(calls) == 4 and load_file(cut)["input_ids"].shape == (40, 6)
    assert with_generated(name, source) == cut and len(calls) == 4
    assert Path(cut).name.startswith("generated-40x6-greedy4-t1-seed0-")
    assert [path.suffix for path in cache.iterdir() if not path.name.startswith(".")] == [".safetensors"]
    whole = load_file(cut)["input_ids"]
    Path(cut).unlink()
    assert torch.equal(load_file(with_generated(name, source))["input_ids"], whole)
    other = with_generated(name + ":seed=1", source)
    assert other != cut and not torch.equal(load_file(other)["input_ids"], whole)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("generated:example=4", "unknown setting 'example'; known are examples, tokens"),
        ("generated:tokens=many", "tokens='many' is no whole number; give such as tokens=128"),
        ("generated:tokens=64.5", "tokens='64.5' is no whole number"),
        ("generated:temperature=hot", "temperature='hot' is no number; give such as temperature=1.0"),
        ("generated:tokens=1", "wanted examples of 1 to"),
        ("generated:temperature=nan", "wanted examples of 1 to"),
        ("generated:tokens=64", "the model reads 32 tokens at most; give tokens=32 or fewer"),
    ],
)
def test_settings_that_cannot_be_are_refused(name: str, said: str, folder: Path) -> None:
    with pytest.raises(DataError, match=said):
        with_generated(name, open_source(folder))


def test_nothing_is_written_without_weights(folder: Path) -> None:
    with pytest.raises(DataError, match="no weights are read here; leave --data out"):
        with_generated("generated:tokens=8", open_source(folder, weights=False))
    assert parsed("generated") == Sampling()
    assert parsed("generated:tokens=64.0:seed=3") == Sampling(tokens=64, seed=3)


@pytest.mark.usefixtures("quick_reopening")
def test_a_run_learns_from_it_and_says_so(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = {
        "name": "own",
        "data": {"source": "generated:examples=24:tokens=16", "held": 4, "max_length": 16, "prompt": False},
        "stages": [
            {"magnitude_structured": {"keep": 0.8}},
            {"recover": {"steps": 2, "batch": 4, "micro_batch": 4}},
        ],
    }
    result = compresso.run(recipe, tiny_folder, output=tmp_path / "out", quiet=True, allow_collapsed=True)
    assert result.records["data"]["source"].startswith("generated-24x16-greedy4-t1-seed0-")
    assert "generated-24x16" in (result.folder / "README.md").read_text()
    assert str(tmp_path) not in (result.folder / "records.json").read_text()
