"""The recall task of `benchmarks/context.py` and its page: what is asked was told, and what is stored is drawn."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from compresso.edit.context_attention import keepers_of
from tests.edit.test_context_gates import dense
from tests.edit.test_evict import forgetful
from tests.formats.nano_variants import nano_tokenizer


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import context_recall  # pyright: ignore[reportMissingImports]
    import context_report  # pyright: ignore[reportMissingImports]
    import context_speed  # pyright: ignore[reportMissingImports]

    yield SimpleNamespace(recall=context_recall, report=context_report, speed=context_speed)


@pytest.mark.parametrize("embedded", [True, False])
def test_what_is_asked_was_told_and_nothing_else_tells_it(embedded: bool, modules: SimpleNamespace) -> None:
    tokenizer: PreTrainedTokenizerBase = nano_tokenizer()
    kind = modules.recall.kind_of(embedded, 3)
    asked = modules.recall.items(tokenizer, kind, 12, 300, 3, 7)
    assert asked.ids.shape == (12, 300) and asked.choices.shape == (12, 3)
    assert len(set(asked.answers.tolist())) == 3
    for ids, choices, answer in zip(asked.ids, asked.choices, asked.answers, strict=True):
        text = str(tokenizer.decode(ids, skip_special_tokens=True))
        begun = text[text.rindex(kind.begins.partition("{name}")[0] or ". ") :].removeprefix(". ").strip()
        if embedded:
            begun = " ".join(text.split()[-4:])
        assert text.count(begun) == 2, "told once and asked once"
        told = text[text.index(begun) + len(begun) :]
        right = str(tokenizer.decode([choices[answer]]))
        assert told.startswith(right)
        assert len(set(choices.tolist())) == 3
    again = modules.recall.items(tokenizer, modules.recall.kind_of(embedded, 3), 12, 300, 3, 7)
    assert torch.equal(again.ids, asked.ids)
    with pytest.raises(ValueError, match="20 tokens hold no 3 facts and a question"):
        modules.recall.items(tokenizer, kind, 1, 20, 3, 7)


def test_answers_are_the_likeliest_choices_whatever_the_chunks_are(modules: SimpleNamespace) -> None:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 64, (5, 30), generator=generator)
    choices = torch.stack([torch.randperm(60, generator=generator)[:4] + 3 for _ in range(5)])
    model = dense("llama")
    best = model(ids).logits[:, -1].gather(1, choices).argmax(1)
    asked = modules.recall.Items(ids, choices, best)
    right, live, size = modules.recall.answered(model, asked, 7, 2)
    assert bool(right.all()) and live == 1 and size == 30 * 3 * 2 * 2 * 8 * 4
    wrong = modules.recall.Items(ids, choices, (best + 1) % 4)
    assert not modules.recall.answered(model, wrong, 30, 5)[0].any()
    cut, live, _ = modules.recall.answered(forgetful("window:6"), asked, 5, 2)
    assert live == pytest.approx(6 / 30) and len(cut) == 5


@pytest.mark.parametrize("method", ["dense", "gates", "window", "keydiff", "h2o", "snapkv"])
def test_filled_caches_hold_the_share_and_are_decoded_behind(method: str, modules: SimpleNamespace) -> None:
    speed, model = modules.speed, dense("llama")
    options = SimpleNamespace(share=0.5, filled=True, new_tokens=3)
    found = speed.turn(model, method, options, 2, 100)
    each = 3 * 2 * 2 * 8 * 4  # bytes of a token: layers, keys and values, heads, width, float32
    assert speed.whole_bytes(model, 2, 100) == 2 * 100 * each
    assert found.seconds > 0 and not keepers_of(model)
    if method == "dense":
        assert (found.size, found.live) == (2 * 104 * each, 1)
        return
    step = {"gates": 4, "snapkv": 4}.get(method, 2)  # of 104 tokens, 52 by rules that cut at each; what came stays else
    assert found.live == pytest.approx((50 + step) / 104)
    groups = 1 if method in ("gates", "window") else 2
    more = {"gates": 32 * 4, "h2o": 2 * 4}.get(method, 0)
    assert found.size == 2 * 64 * (each + 3 * (9 * groups + more))
    read = speed.turn(model, method, SimpleNamespace(share=0.5, filled=False, new_tokens=3), 2, 40)
    assert read.seconds > 0 and (read.live < 0.6 or method in ("gates", "snapkv"))


def row(part: str, method: str, share: float, **more: Any) -> dict[str, Any]:
    machine = {"processor": "p", "threads": 1, "cores": 2, "load_before": 1.5}
    return {"part": part, "model": "m<b>", "method": method, "share": share, "machine": machine, **more}


def test_the_page_holds_every_line_and_every_colour_that_its_charts_name(
    modules: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules.report, "RESULTS", tmp_path)
    rows: list[dict[str, Any]] = []
    for method, share in (("dense", 1.0), ("window", 0.5)):
        rows.append(row("text", method, share, perplexity=10 / share, seen=share, windows=2, length=64))
        facts = {"right": int(8 * share), "items": 8, "facts": 4, "live": share, "bytes": 2e6 * share}
        rows.append(row("recall", method, share, **facts, length=64, chunk=16))
        timed = {"context": 128, "batch": 8, "tokens_per_s": 50.0, "rates": [40.0, 50.0], "new_tokens": 4}
        rows.append(row("speed", method, share, **timed, bytes=3e6 * share, live=share))
    modules.report.report(json.loads(json.dumps(rows)))
    text, page = (tmp_path / "context.md").read_text(), (tmp_path / "context.html").read_text()
    for line in (
        "| 1 | dense | 1.000 | 10.00 |",
        "| 0.5 | window | 0.500 | 20.00 |",
        "| 0.5 | window | 0.500 | 1.000 | 50 ± 18 |",
        "| 128 | window | 8 | 0.500 | 1.50 | 50.0 | 40.0 to 50.0 |",
    ):
        assert line in text
    assert "m&lt;b&gt;" in page and "m<b>" not in page
    named = set(re.findall(r"var\((--[\w-]+)\)", page))
    assert {"--s0", "--muted", "--line"} <= named <= set(re.findall(r"(--[\w-]+):", page))
    assert page.count("<figure>") == 4 and "decode tokens/s against tokens of context, batch 8" in page


def test_windows_of_other_lengths_stand_in_tables_of_their_own(modules: SimpleNamespace) -> None:
    rows = [
        row("text", "dense", 1.0, perplexity=length / 8, seen=1.0, windows=2, length=length) for length in (64, 512)
    ]
    text = modules.report.markdown(rows)
    assert text.count("### Perplexity") == 1
    short, long = text.index("2 windows of 64 tokens"), text.index("2 windows of 512 tokens")
    assert short < text.index("| 8.00 |") < long < text.index("| 64.00 |")
