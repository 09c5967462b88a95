"""Attention to tasks and templates: by hand on small tensors, on a tiny model against transformers' own attentions, and
shifts of which the direction is known.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from scipy.stats import mannwhitneyu
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from compresso.data import nano
from compresso.edit.eager import attention_of
from compresso.errors import DataError
from compresso.metrics.record import Environment
from compresso.metrics.trust.attention import MEASURES, Places, looked_at, measured, places
from compresso.metrics.trust.attention_shift import attention_changes, attention_measurements, looks
from compresso.metrics.trust.journal import Journal
from compresso.metrics.trust.refusal_prompts import BARE, BENIGN, Prompt

TOKENIZER = AutoTokenizer.from_pretrained(nano.path())
TASK = "Draw the little house."


def prompt(text: str, template: str = "T1", category: str = "c", place: int = 0) -> Prompt:
    return Prompt(f"{template}/{place}", template, category, "low", TASK, text)


PROMPTS = [prompt(f"{'You are a painter. ' * n}{TASK}{' Now begin.' * (n % 2)}", "T1", "c", n) for n in range(1, 5)]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(TOKENIZER), max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_one_head_by_hand() -> None:
    """Format, template, task, template, format: of the task's row .6 of .8 goes to the task; of the template's behind
    it .3 of .9, as much as to each other token; of the last .1 of .4, of which one template's token gets more and one
    less.
    """
    rows = torch.tensor(
        [
            [1.0, 0, 0, 0, 0],
            [0.5, 0.5, 0, 0, 0],
            [0.2, 0.2, 0.6, 0, 0],
            [0.1, 0.3, 0.3, 0.3, 0],
            [0.4, 0.3, 0.1, 0, 0.2],
        ]
    )
    found = measured(rows[None], Places((9, 9, 9, 9, 9), (2,), (1, 3)))
    assert {name: round(value, 6) for name, value in found.items() if name != "entropy"} == {
        "task/share": 0.75,
        "task/rank": 0,
        "template/share": pytest.approx(1 / 3, abs=1e-6),
        "template/rank": 0.5,
        "last/share": 0.25,
        "last/rank": 0.5,
    }

    def entropy(*row: float) -> float:
        return -sum(p * math.log(p) for p in row) / math.log(len(row))

    rest = [entropy(0.2, 0.2, 0.6), entropy(0.1, 0.3, 0.3, 0.3), -sum(p * math.log(p) for p in (0.4, 0.3, 0.1, 0.2))]
    assert found["entropy"] == pytest.approx((1 + rest[0] + rest[1] + rest[2] / math.log(5)) / 4, abs=1e-6)


def test_heads_count_equally_and_extremes_are_the_ends() -> None:
    """One head that sees the task alone, one the template alone: half; even attention has the most entropy."""
    where = Places((9,) * 6, (4,), (1, 2))
    even = torch.ones(6, 6).tril() / torch.arange(1, 7).unsqueeze(-1)
    task, template = even.clone(), even.clone()
    task[5], template[5] = torch.eye(6)[4], torch.eye(6)[1]
    found = [measured(rows, where) for rows in (task[None], template[None], torch.stack((task, template)), even[None])]
    assert [one["last/share"] for one in found] == pytest.approx([1, 0, 0.5, 1 / 3])
    assert [one["last/rank"] for one in found] == pytest.approx([0, 0.75, 0.375, 0.5])
    assert found[3]["entropy"] == pytest.approx(1) and found[0]["entropy"] < 1
    assert "template/share" not in found[0], "no token of the template stands behind the task"


def test_rank_is_the_statistic_of_mann_and_whitney() -> None:
    torch.manual_seed(1)
    rows = torch.rand(1, 20, 20).tril().softmax(-1)
    task, template = (3, 7, 8, 15), (1, 2, 5, 6, 10, 12)
    pairs = mannwhitneyu(rows[0, 19, list(template)].numpy(), rows[0, 19, list(task)].numpy()).statistic
    assert measured(rows, Places((9,) * 20, task, template))["last/rank"] == pytest.approx(pairs / 24)


def test_a_task_is_found_wherever_it_stands() -> None:
    for one in PROMPTS:
        where = places(TOKENIZER, one)
        task = TOKENIZER.decode([where.ids[i] for i in where.task])
        template = TOKENIZER.decode([where.ids[i] for i in where.template])
        assert task.strip() == TASK and "painter" in template and "house" not in template
        assert set(where.task).isdisjoint(where.template) and max(where.template) < len(where.ids) - 1
    bare = places(TOKENIZER, prompt(TASK, BARE))
    assert not bare.template and bare.task


def test_a_model_is_read_as_transformers_shows_it(model: LlamaForCausalLM) -> None:
    """The mean of what each layer's own output says, and attention is computed as before afterwards."""
    where = places(TOKENIZER, PROMPTS[1])
    before = attention_of(model)
    found = looked_at(model, where)
    assert attention_of(model) == before == "sdpa"
    model.set_attn_implementation("eager")
    with torch.no_grad():
        shown = model(input_ids=torch.tensor([where.ids]), output_attentions=True).attentions
    model.set_attn_implementation(before)
    layers = [measured(one[0], where) for one in shown]
    assert len(layers) == 3 and set(found) <= set(MEASURES)
    for name, value in found.items():
        assert value == pytest.approx(sum(one[name] for one in layers) / 3, abs=1e-6)


def test_what_shows_no_attention_is_refused(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    where = places(TOKENIZER, PROMPTS[0])
    for block in model.model.layers:
        attention = block.get_submodule("self_attn")
        inner = attention.forward
        monkeypatch.setattr(attention, "forward", lambda *a, inner=inner, **k: (inner(*a, **k)[0], None))
    with pytest.raises(DataError, match="no layer of a llama model shows the probabilities of its attention"):
        looked_at(model, where)


def test_templates_alone_are_read_one_at_a_time_and_a_stopped_call_goes_on(
    model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: (seen.append(len(k["input_ids"])), forward(*a, **k))[1])
    others = [prompt(TASK, BARE), prompt(PROMPTS[0].text, category=BENIGN), prompt("word " * 300 + TASK, "T9")]
    path = tmp_path / "a.jsonl"
    found = looks(model, TOKENIZER, [*others, *PROMPTS], journal=Journal(path, {"model": "m"}))
    assert sorted(found) == sorted(one.id for one in PROMPTS), "what is bare, benign or too long is not"
    assert seen == [1] * len(PROMPTS)
    assert looks(model, TOKENIZER, PROMPTS, journal=Journal(path, {"model": "m"})) == found and len(seen) == len(
        PROMPTS
    )
    assert "house" not in path.read_text()
    with pytest.raises(DataError, match="prompts in templates, and none was chosen"):
        looks(model, TOKENIZER, others[:1])


def test_numbers_and_shifts() -> None:
    """Twelve prompts of which each looks .1 more at the task, and twelve of which half do and half do not."""
    dense = {f"p{i}": {"entropy": 0.5, "task/share": 0.3 + i / 100, "last/rank": 0.5} for i in range(12)}
    small = {
        id: {"entropy": 0.5, "task/share": one["task/share"] + 0.1, "last/rank": 0.5 + (0.1, -0.1)[i % 2]}
        for i, (id, one) in enumerate(dense.items())
    }
    (entropy, share, rank) = attention_changes(dense, small)
    assert (entropy.name, entropy.difference, entropy.p, entropy.verdict) == ("attention/entropy", 0, 1, "within noise")
    assert share.difference == pytest.approx(0.1) and share.verdict == "rose" and share.n == 12
    assert share.p == pytest.approx(2 / 2**12), "all of 12 signs alike"
    assert share.p_adjusted == pytest.approx(3 * 2 / 2**12)
    assert rank.verdict == "within noise" and rank.difference == pytest.approx(0)
    assert {one.verdict for one in attention_changes(dense, small, "it loops")} == {"not comparable"}
    made = {one.name: one for one in attention_measurements(dense, Environment.here(), {"prompts": "x"})}
    assert made["attention/task/share"].value == pytest.approx(0.355) and made["attention/entropy"].n == 12
    assert (
        "eager" in str(made["attention/entropy"].remark) and made["attention/entropy"].protocol["attention"] == "eager"
    )
    assert json.loads(made["attention/task/share"].model_dump_json())["low"] < 0.355
