"""Numbers under a cache that forgets. Laws: a rule that holds all gives the dense model's logits, gates those of the
masked forward; shares and bytes are counted by hand.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import Gemma2Config, PreTrainedModel

import compresso
from compresso.checkpoint.load import load_model
from compresso.checkpoint.source import open_source
from compresso.edit.context_attention import keepers_of
from compresso.edit.context_cache import BLOCK
from compresso.edit.prefill import prefill_patch
from compresso.errors import ArchError
from compresso.metrics.forward import window_logits
from compresso.metrics.pruned_context import (
    CHUNK,
    ReadThrough,
    check_cache,
    has_gates,
    hold_context_,
    left_out,
    reading,
)
from compresso.metrics.record import Environment
from tests.edit.test_context_gates import dense, gated
from tests.edit.test_evict import forgetful
from tests.metrics.forgetting import gated_folder

LENGTHS = (40, 9, 40, 17)
WINDOWS = [
    torch.randint(3, 64, (n,), generator=torch.Generator().manual_seed(i)).tolist() for i, n in enumerate(LENGTHS)
]


def logits(model: PreTrainedModel, how: Callable[..., Iterator[tuple[int, torch.Tensor]]]) -> dict[int, torch.Tensor]:
    return dict(how(model, WINDOWS, 3))


def numbers(read: ReadThrough) -> dict[str, float]:
    found = read.measurements("x", {"corpus": "x"}, Environment.here())
    return {one.name: one.value for one in found}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_rule_that_holds_all_gives_the_logits_of_the_dense_model(name: str) -> None:
    model = forgetful("keydiff:64", name)
    read = ReadThrough(model, "keydiff:64")
    found, wanted = logits(model, read), logits(dense(name), window_logits)
    assert found.keys() == wanted.keys() == set(range(4))
    for i in wanted:
        torch.testing.assert_close(found[i], wanted[i], rtol=0, atol=1e-4)
    assert numbers(read)["cache_live/x"] == 1


def test_gates_give_the_logits_of_the_masked_forward_whose_length_no_chunk_divides() -> None:
    model = gated()
    read = reading(model, None)
    assert read is not None and read.settings == {}
    found, wanted = logits(model, read), logits(model, window_logits)
    for i in wanted:
        torch.testing.assert_close(found[i], wanted[i], rtol=0, atol=1e-4)
    told = numbers(read)
    assert 0.1 < told["cache_live/x"] < 0.9
    assert told.keys() == {"cache_live/x", "cache_bytes/x"}


def test_shares_and_bytes_are_those_of_a_window_counted_by_hand() -> None:
    model, budget, n = forgetful("window:10"), 10, 2 * CHUNK
    read = ReadThrough(model, "window:10")
    list(read(model, [WINDOWS[0][:n]] * 2, 8))
    triangle = CHUNK * (CHUNK - 1) // 2
    seen, there = triangle + CHUNK * budget + triangle, triangle + CHUNK * CHUNK + triangle
    told = {one.name: one for one in read.measurements("x", {"corpus": "x"}, Environment.here())}
    assert told["cache_live/x"].value == pytest.approx(budget / n)
    assert told["cache_seen/x"].value == pytest.approx(seen / there)
    keys_and_values, bookkeeping = 2 * 2 * 8 * 4, 8 + 1  # of two heads of 8 floats; a place and whether it is live
    assert told["cache_bytes/x"].value == 3 * BLOCK * (keys_and_values + bookkeeping)
    assert told["cache_bytes/x"].remark == (
        f"the whole cache of as many tokens takes {3 * n * keys_and_values / 1e6:,.2f} MB"
    )
    assert told["cache_live/x"].protocol["cache"] == "window:10"
    assert read.settings == {"cache": "window:10", "cache_chunk": CHUNK}


def test_a_model_that_holds_everything_is_read_as_ever() -> None:
    assert reading(dense("llama"), None) is None


def test_a_folder_with_gates_says_so_and_gets_them(tiny_folder: Path, tmp_path: Path) -> None:
    folder = gated_folder(tiny_folder, tmp_path / "gated")
    source, plain = open_source(folder), open_source(tiny_folder)
    assert has_gates(source) and not has_gates(plain)
    model = load_model(source)
    hold_context_(model, source, None)
    assert len(keepers_of(model)) == 3
    other = load_model(plain)
    hold_context_(other, plain, None)
    assert not keepers_of(other)
    hold_context_(other, plain, "h2o:0.5")
    assert len(keepers_of(other)) == 3
    with pytest.raises(ArchError, match=r"--cache 'h2o:0\.5': learned gates decide what the cache of gated holds"):
        check_cache(source, "h2o:0.5")


def test_a_folder_that_skips_layers_is_timed_so_and_rounding_is_left_out_aloud(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """What computes less is what speed is about; what computes integers by full numbers has no engine's speed."""
    folder = tmp_path / "patched"
    shutil.copytree(tiny_folder, folder)
    rounds = "round_inputs token model.layers.0.mlp.up_proj"
    (folder / "records.json").write_text(json.dumps({"patches": ["skip_in_prefill 1", rounds]}))
    source = open_source(folder)
    model, skips, all_of_it = load_model(source), load_model(source), compresso.load(folder).model
    skip = prefill_patch([1])
    skip.apply_(skips)
    hold_context_(model, source, None)
    ids = torch.arange(3, 20).unsqueeze(0)
    with torch.no_grad():
        held, wanted, other, plain = (one(ids).logits for one in (model, skips, all_of_it, load_model(source)))
    assert torch.equal(held, wanted) and not torch.equal(held, plain) and not torch.equal(held, other)
    assert left_out(source) == [
        "patched: measured by its weights alone, without round_inputs, which compresso.load computes with full numbers"
    ]
    assert left_out(open_source(tiny_folder)) == []


def test_attention_that_is_not_patched_is_refused_by_its_config(tmp_path: Path) -> None:
    Gemma2Config(hidden_size=32, num_hidden_layers=2).save_pretrained(tmp_path)
    with pytest.raises(ArchError, match="context of a gemma2 cannot be pruned"):
        check_cache(open_source(tmp_path / "config.json"), "keydiff:0.5")
