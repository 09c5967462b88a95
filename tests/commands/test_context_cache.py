"""`measure`, `evaluate` and `verify` on a cache that forgets, by a rule or by learned gates.

Laws: a rule that holds all leaves the perplexity, gates read through their cache give that of the masked forward, and a
cache that frees nothing of what gates drop is found out.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Call
from tests.edit.test_context_gates import dense, gated, ids
from tests.metrics.forgetting import gated_folder
from torch import Tensor

from compresso.checkpoint.load import load_model
from compresso.checkpoint.source import open_source
from compresso.checkpoint.tokenizer import load_tokenizer
from compresso.commands import measure as measuring
from compresso.commands import verify as verifying
from compresso.commands.evaluate import evaluate
from compresso.commands.evaluate_table import show as show_scores
from compresso.commands.measure import measure
from compresso.edit.context_attention import keepers_of
from compresso.edit.context_cache import ContextLayer
from compresso.edit.context_layer_gates import LayerGates
from compresso.engines import context, registry
from compresso.engines.parity import Parity, ids_of
from compresso.engines.transformers import OWN, PLAIN, REMOTE, Transformers
from compresso.engines.verify import verify
from compresso.errors import ArchError, DataError
from compresso.loading import load
from compresso.metrics import memory
from compresso.metrics.latency import GATED
from compresso.metrics.perplexity import perplexity, preset
from compresso.metrics.pruned_context import CHUNK
from compresso.metrics.record import Environment, Measurement, ModelResults

BRIEF: dict[str, Any] = {
    "batches": (2,),
    "prompt_tokens": 40,
    "new_tokens": 4,
    "rounds": 1,
    "memory": False,
    "quiet": True,
}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    rows = [f"The fox number {n} lives in the forest of {n * n} trees and sleeps for {n} days." for n in range(30)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


@pytest.fixture
def forgetting(tiny_folder: Path, tmp_path: Path) -> Path:
    return gated_folder(tiny_folder, tmp_path / "gated")


def test_a_model_stands_beside_itself_with_the_cache(tiny_folder: Path) -> None:
    whole, cut = measure([tiny_folder], cache="keydiff:0.25", **BRIEF).models
    assert (cut.name, cut.fingerprint) == (f"{whole.name}, keydiff:0.25", whole.fingerprint)
    assert (whole.value("cache_live/batch2"), cut.value("cache_live/batch2")) == (1, 0.25)
    each = 3 * 2 * 4 * 8 * 4  # bytes of a token: layers, keys and values, heads, width, float32
    assert whole.value("cache_bytes/batch2") == 2 * 44 * each
    assert cut.value("cache_bytes/batch2") == 2 * 64 * (each + 3 * 4 * 9)  # one block of slots, with their places
    assert whole.value("parameters/total") == cut.value("parameters/total")
    protocols = [next(one.protocol for one in of.measurements if one.name == "decode/batch2") for of in (whole, cut)]
    assert protocols[1] == {**protocols[0], "cache": "keydiff:0.25"}
    speedup = next(one for one in cut.measurements if one.name == "decode_speedup/batch2")
    assert "every tensor is as large" not in (speedup.remark or "")


def test_weights_are_held_once() -> None:
    model = dense("llama")
    other = measuring._sharing(model)  # pyright: ignore[reportPrivateUsage]
    assert other.config is not model.config and other.get_submodule("model.layers.0") is not model.model.layers[0]
    for one, same in zip(model.parameters(), other.parameters(), strict=True):
        assert one is same
    assert other.lm_head.weight is model.lm_head.weight


def test_a_model_with_gates_is_measured_with_its_own_cache_and_no_rule(tiny_folder: Path, forgetting: Path) -> None:
    whole, cut, own = measure([tiny_folder, forgetting], cache="window:8", **BRIEF).models
    assert [whole.name, cut.name, own.name] == ["tiny", "tiny, window:8", "gated"]
    assert cut.value("cache_live/batch2") == pytest.approx(8 / 44)
    live = next(one for one in own.measurements if one.name == "cache_live/batch2")
    assert 0.01 < live.value < 0.99 and live.remark == GATED
    plain = measure([tiny_folder], **BRIEF).models[0]
    assert plain.value("cache_live/batch2") is None


def test_peak_memory_is_taken_with_the_cache(
    tiny_folder: Path, forgetting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def peak(folder: Path, **given: Any) -> Measurement:
        asked.append((folder.name, given["cache"]))
        protocol: dict[str, Any] = {"batch": 2}
        return Measurement(
            name="memory/peak", value=5, unit="bytes", how="measured", protocol=protocol, environment=Environment.here()
        )

    monkeypatch.setattr(measuring, "peak_memory", peak)
    measure([tiny_folder, forgetting], cache="window:8", **{**BRIEF, "memory": True})
    assert asked == [("tiny", None), ("tiny", "window:8"), ("gated", None)]


@pytest.mark.parametrize("cache", [None, "window:8"])
def test_the_process_that_takes_peak_memory_has_the_cache(
    cache: str | None, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(memory, "prefill_and_decode", lambda model, *_: seen.append(len(keepers_of(model))))
    memory._measured(str(tiny_folder), "cpu", None, 1, 4, 2, 0, cache)  # pyright: ignore[reportPrivateUsage]
    assert seen == [3 if cache else 0]


def test_what_is_refused_before_weights_are_read(
    call: Call, tiny_folder: Path, forgetting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(measuring, "load_model", refuse)
    monkeypatch.setattr(sys.modules["compresso.loading"], "load_model", refuse)
    for arguments, said in (
        (("measure", tiny_folder, "--cache", "nearest:0.5"), "--cache 'nearest:0.5': wanted one of window, knorm"),
        (("evaluate", tiny_folder, "--cache", "keydiff:2.5"), "--cache 'keydiff:2.5': wanted a share between 0 and 1"),
        (("measure", forgetting, "--cache", "h2o:0.5"), "learned gates decide what the cache of gated holds; leave"),
        (("evaluate", forgetting, "--cache", "h2o:0.5"), "learned gates decide what the cache of gated holds; leave"),
        (
            ("evaluate", tiny_folder, "--cache", "h2o:0.5", "--tasks", "piqa"),
            "--cache 'h2o:0.5': tasks and suites are scored in forwards without a cache, where a rule drops nothing;",
        ),
    ):
        code, out, error = call(*arguments)
        assert (code, out) == (2, "") and said in error and len(error.splitlines()) == 1, error
    with pytest.raises(DataError, match=r"^cache='h2o:9': learned gates decide what every model's cache holds"):
        measure([forgetting, forgetting], cache="h2o:9", **BRIEF)
    with pytest.raises(ArchError, match=r"^cache='h2o:9': learned gates .* leave cache= out$"):
        evaluate(forgetting, cache="h2o:9")


def read(model: Path, texts: Path, cache: str | None = None) -> ModelResults:
    (found,) = evaluate(model, corpus=str(texts), protocol="llm-pruner", cache=cache, device="cpu").models
    return found


def test_perplexity_is_taken_under_eviction(tiny_folder: Path, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, whole, cut = (read(tiny_folder, texts, cache) for cache in (None, "knorm:128", "knorm:4"))
    name = "texts/perplexity"
    assert whole.value(name) == pytest.approx(plain.value(name), rel=1e-5)
    assert abs((cut.value(name) or 0) / (plain.value(name) or 1) - 1) > 1e-4
    (one,) = (one for one in cut.measurements if one.name == name)
    (other,) = (one for one in plain.measurements if one.name == name)
    assert one.protocol == {**other.protocol, "cache": "knorm:4", "cache_chunk": CHUNK}
    assert cut.value("cache_live/texts") == pytest.approx(4 / 128)
    assert (whole.value("cache_live/texts"), plain.value("cache_live/texts")) == (1, None)
    assert (cut.value("cache_bytes/texts") or 0) < (whole.value("cache_bytes/texts") or 0)
    report = evaluate(tiny_folder, corpus=str(texts), protocol="llm-pruner", cache="knorm:4", device="cpu")
    show_scores(report)
    said = capsys.readouterr().out
    assert "the whole cache of as many tokens takes" in said
    assert "Not measured: tasks (--suite or --tasks)." in said


def test_a_model_with_gates_is_read_through_its_cache_as_by_its_masked_forward(forgetting: Path, texts: Path) -> None:
    found = read(forgetting, texts)
    loaded = load(forgetting)
    assert loaded.tokenizer is not None
    rows = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    masked = perplexity(loaded.model, loaded.tokenizer, rows, preset("llm-pruner", "texts", "all"))
    assert found.value("texts/perplexity") == pytest.approx(masked.value, rel=1e-5)
    (one,) = (one for one in found.measurements if one.name == "texts/perplexity")
    assert "cache" not in one.protocol, "gates are the model's own, so that its number stands beside the dense one's"
    assert 0.01 < (found.value("cache_live/texts") or 0) < 0.99


def test_decoding_through_the_cache_is_the_masked_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gated(dtype=torch.float64)
    found = context.compared(model, ids(1, 40)[0])
    assert (found.opens, found.same_tokens) == ("yes", 8)
    assert found.difference is not None and found.difference < 1e-6
    assert "token by token as the masked forward, " in found.reason and "% of 40 tokens live" in found.reason
    put = ContextLayer.put
    monkeypatch.setattr(ContextLayer, "put", lambda self, one, kept: put(self, one, torch.ones_like(kept)))
    broken = context.compared(model, ids(1, 40)[0])
    assert broken.opens == "no" and broken.reason.startswith("logits with and without the cache differ by up to")


def test_double_precision_is_kept_in_scores() -> None:
    gate = LayerGates(4, 2, 0.0)
    x = torch.randn(1, 1, 3, 2, dtype=torch.float64)
    assert gate.scores(x, x).dtype == torch.float64
    assert gate.scores(x.bfloat16(), x.bfloat16()).dtype == torch.float32


def test_verify_says_it_of_a_model_with_gates_alone(
    forgetting: Path,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(registry, "engines", lambda: (PLAIN,))
    monkeypatch.setattr(Transformers, "parity", lambda self, *_: Parity(self.name, "yes", "", 1e-6, 8))
    own, plain = verify(forgetting)
    assert (own.engine, own.opens, plain.reason) == (context.NAME, "yes", context.UNGATED)
    verifying.show([own, plain], as_json=False)
    first, second = capsys.readouterr().out.splitlines()
    assert "live, largest difference" in first and "8 of 8 greedy tokens the same" in first
    assert f"{context.UNGATED}, largest difference 1e-06" in second
    assert [one.engine for one in verify(tiny_folder)] == [PLAIN.name]
    asked: list[Tensor] = []
    config = json.loads((forgetting / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_compresso_patched.PatchedForCausalLM"}
    (forgetting / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(registry, "engines", lambda: (PLAIN, REMOTE))
    monkeypatch.setattr(
        Transformers, "parity", lambda self, _, wanted: asked.append(wanted.logits) or Parity(self.name, "yes")
    )
    _, plain, remote = verify(forgetting)
    assert remote.reason == "with context_gates, by its own code" and plain.reason == context.UNGATED
    own_model = load(forgetting, dtype=torch.float32).model
    with torch.no_grad():
        wanted = own_model(ids_of(load_tokenizer(open_source(forgetting)), 10**9).unsqueeze(0), use_cache=False).logits[
            0
        ]
    torch.testing.assert_close(asked[1], wanted)
    assert not torch.allclose(asked[0], wanted, atol=1e-3)
    monkeypatch.setattr(context, "available", lambda _: 1)
    assert verify(forgetting)[0].opens == "not checked"


def test_a_cache_that_says_something_else_is_a_failure_of_verify() -> None:
    good = Parity(OWN.name, "yes")
    assert verifying.opens_here([Parity(context.NAME, "yes"), good])
    assert not verifying.opens_here([Parity(context.NAME, "no"), good])


def test_gates_without_their_tensors_are_refused(forgetting: Path) -> None:
    shutil.rmtree(forgetting / "patches")
    source = open_source(forgetting)
    with pytest.raises(Exception, match=r"patches/tensors.safetensors is missing"):
        measure([forgetting], **BRIEF)
    assert load_model(source) is not None
