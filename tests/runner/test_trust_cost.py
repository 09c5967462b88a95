"""What asking for trust would take: as many tokens as a real model is then given, and one line for what cannot be
counted.
"""

import functools
import json
import shutil
from pathlib import Path

import pytest
from tests.metrics.trust.made_up import data
from tests.metrics.trust.scripted import benign_tree, tree
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, MobileViTConfig, PreTrainedConfig

from compresso.commands.plan import plan
from compresso.commands.plan_table import show
from compresso.data import nano
from compresso.errors import DataError
from compresso.metrics.forward import context_of
from compresso.metrics.trust.asking import Limits, ModelRespondent, Request
from compresso.metrics.trust.counting import Counting
from compresso.runner.devices import DEVICES, REACHED, planned
from compresso.runner.trust_cost import timed

RECIPE = {"stages": [{"magnitude": {"sparsity": 0.5}}]}
TEMPLATE = "There is a town by the river, with a mill, a school and a market. In this town somebody asks: "


def test_tokens_are_those_that_a_model_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(nano.path()), AutoTokenizer.from_pretrained(nano.path())
    read: list[int] = []
    forward = model.forward

    @functools.wraps(forward)
    def watched(*given, **named):  # type: ignore[no-untyped-def]
        read.append(named["input_ids"].numel() if named["input_ids"].shape[-1] > 1 else 0)
        return forward(*given, **named)

    monkeypatch.setattr(model, "forward", watched)
    requests = [Request(f"r{i}", f"{TEMPLATE}{end}") for i, end in enumerate(("Who?", "Where is the mill?", "Why?"))]
    requests += [Request("b", "Name a colour."), Request("long", "word " * 3000)]
    asked, counted = ModelRespondent(model, tokenizer, batch=4), Counting(tokenizer, context_of(model), batch=4)
    asked.write(requests, Limits(6))
    counted.write(requests, Limits(6))
    assert counted.read == sum(read) and counted.requests == 4
    assert (counted.written, counted.steps) == (24, 12), "three of the template together, one alone"
    read.clear()
    before = counted.read
    choices = [("yes", "no"), ("the mill", "a wall")] + [("a", "b")] * 3
    asked_one_by_one = ModelRespondent(model, tokenizer, batch=1)
    assert [one is None for one in asked_one_by_one.weigh(requests, choices)] == [
        one is None for one in counted.weigh(requests, choices)
    ]
    assert counted.read - before == sum(read), "one at a time nothing is padded"


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    """The config and tokenizer of a small model, with a chat template and without weights."""
    folder = tmp_path / "chat"
    shutil.copytree(nano.path(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_plan_says_what_both_suites_take(
    chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMPRESSO_DATA", str(tmp_path / "data"))
    data(tmp_path / "data")
    (tmp_path / "h.json").write_text(json.dumps(tree()))
    (tmp_path / "b.json").write_text(json.dumps(benign_tree()))
    facts = plan(
        RECIPE, chat, trust="quick", prompts=tmp_path / "h.json", benign=tmp_path / "b.json", device="h100"
    )  # fmt: skip
    trust, refusals = facts["trust"]
    assert refusals["requests"] == 2 * 2475 and refusals["models"] == trust["models"] == 2
    assert list(trust["not_measured"]) == ["toxicity"] and 100 < trust["requests"] < 1000
    macs = facts["before"]["macs_per_token"] + facts["after"]["macs_per_token"]
    assert refusals["flops_at_most"] == 2 * macs * (refusals["read"] + refusals["written_at_most"])
    show(facts, False)
    out = " ".join(capsys.readouterr().out.split())
    assert "--trust quick: " in out and "not measured: toxicity" in out
    assert "evaluate --suite refusal: 4,950 requests to each of 2 models" in out
    assert plan(RECIPE, chat)["trust"] == []


def test_writing_takes_the_longer_of_products_and_memory() -> None:
    """10 steps that read 8e9 bytes of weights each, and 10 written tokens of 1e9 multiply-accumulates."""
    row = {"read": 0, "written_at_most": 10, "steps_at_most": 10}
    h100 = DEVICES["h100"]
    found = timed(row, {"one": (10**9, 8 * 10**9)}, h100.flops * REACHED, planned("h100"))
    assert found["seconds_estimated"] == round(10 * 8e9 / (h100.bandwidth * REACHED), 1) > 0
    assert found["flops_at_most"] == 2 * 10**10
    slow = timed(row, {"one": (10**9, 8 * 10**9)}, 1e6, planned("h100"))
    assert slow["seconds_estimated"] == 2 * 10**10 / 1e6
    assert timed(row, {"a": (10**9, 0), "b": (10**9, 0)}, 1e9, planned("cpu"))["seconds_estimated"] == 40


def test_what_cannot_be_counted_is_one_line(tmp_path: Path, chat: Path) -> None:
    (tmp_path / "h.json").write_text(json.dumps(tree()))
    config = tmp_path / "bare"
    config.mkdir()
    shutil.copy(nano.path() / "config.json", config)
    for model, options, said in (
        (config, {"trust": "quick"}, "counted in tokens, and bare has no tokenizer"),
        (nano.path(), {"prompts": tmp_path / "h.json"}, "model nano has no chat template"),
        (chat, {"benign": tmp_path / "h.json"}, "benign= is read beside prompts="),
        (chat, {"prompts": tmp_path / "absent.json"}, "is no file"),
    ):
        with pytest.raises(DataError) as caught:
            plan(RECIPE, model, **options)
        assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_models_that_write_no_text_are_told_so_before_a_tokenizer_is_looked_for(task: str, tmp_path: Path) -> None:
    config: PreTrainedConfig = BertConfig(num_labels=2, architectures=["BertForSequenceClassification"])
    if task == "segmentation":
        config = MobileViTConfig(image_size=32, num_labels=3, architectures=["MobileViTForSemanticSegmentation"])
    (tmp_path / "config.json").write_text(config.to_json_string())
    raw = {"task": task, "stages": [{"filter_pruning": {}}]}
    with pytest.raises(
        DataError, match=f"trust='quick' asks models that write text, and those of task '{task}' do not"
    ):
        plan(raw, tmp_path / "config.json", trust="quick")
    with pytest.raises(DataError, match=f"those of task '{task}' write none; leave it out"):
        plan(raw, tmp_path / "config.json", prompts=tmp_path / "none.yaml")
