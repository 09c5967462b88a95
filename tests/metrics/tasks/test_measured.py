"""Measurements of tasks: planted answers, agreement with compresso's own choice accuracy, and what the protocol must
say.
"""

import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.metrics.tasks.conftest import MADE_UP, NewModel, write_rows
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

import compresso
from compresso.data import nano, world
from compresso.data.prompt import Prompt, collaborative_prompt
from compresso.errors import DataError
from compresso.metrics.choices import choice_accuracy
from compresso.metrics.record import Measurement
from compresso.metrics.tasks import prepare, task_measurements
from compresso.metrics.tasks.bars import bars_shown_by
from compresso.metrics.tasks.prompted import PromptedLM
from compresso.training import progress
from compresso.training.progress import Progress


def named(measurements: tuple[Measurement, ...]) -> dict[str, Measurement]:
    found = {one.name: one for one in measurements}
    assert len(found) == len(measurements)
    return found


def likelihood(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> float:
    head, whole = (tokenizer.encode(text) for text in (context, context + continuation))
    with torch.no_grad():
        chances = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(chances[place - 1, whole[place]].item() for place in range(len(head), len(whole)))


def test_a_planted_answer_is_right_and_its_contrary_wrong(
    new_model: NewModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The label is what the model itself prefers, by sum (acc) or by sum over characters (acc_norm)."""
    model = new_model()
    rows = [dict(row) for row in MADE_UP["piqa_validation"]]
    for row in rows:
        totals = [
            likelihood(model, tokenizer, f"Question: {row['goal']}\nAnswer:", f" {row[way]}")
            for way in ("sol1", "sol2")
        ]
        row["label"] = totals.index(max(totals))
    write_rows(tmp_path, "piqa_validation", rows)
    found = named(task_measurements(model, tokenizer, "piqa", data_root=str(tmp_path)))
    assert (found["piqa/acc"].value, found["piqa/acc"].stderr, found["piqa/acc"].n) == (1, 0, len(rows))
    write_rows(tmp_path, "piqa_validation", [row | {"label": 1 - row["label"]} for row in rows])
    assert named(task_measurements(model, tokenizer, "piqa", data_root=str(tmp_path)))["piqa/acc"].value == 0


def test_requests_are_counted_by_our_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.models.huggingface as harness

    theirs, stream = harness.tqdm, io.StringIO()
    monkeypatch.setattr("compresso.metrics.tasks.bars.PATIENCE", 0.0)
    loaded = compresso.load(nano.path())
    assert loaded.tokenizer is not None
    shown = Progress("lines", 0.0, stream)
    task_measurements(loaded.model, loaded.tokenizer, "world", limit=2, batch_size=32, progress=shown)
    lines = stream.getvalue().splitlines()
    assert lines and all(re.match(r"scoring requests  \d+/\d+", line) for line in lines)
    done, of = re.findall(r"\d+", lines[-1])[:2]
    assert done == of and harness.tqdm is theirs
    with pytest.raises(ZeroDivisionError), bars_shown_by(shown):
        harness.tqdm(total=3, desc="Running")
        raise ZeroDivisionError
    assert not progress._FRAMES and harness.tqdm is theirs


def test_the_world_agrees_with_choice_accuracy() -> None:
    """On the same items; the harness tokenises a choice together with what stands before it, which this tokenizer does
    not merge.
    """
    loaded = compresso.load(nano.path())
    assert loaded.tokenizer is not None
    n = 12
    found = named(task_measurements(loaded.model, loaded.tokenizer, "world", limit=n, batch_size=32))
    items = [item for task in world.TASKS for item in world.items(task, 200, 11_000_000)[:n]]
    own = choice_accuracy(loaded.model, loaded.tokenizer, items)
    assert found["world/acc"].value == pytest.approx(own.accuracy)
    for task in world.TASKS:
        assert found[f"world_{task}/acc"].value == own.tasks[task]
    assert own.accuracy > 0.95
    assert found["world_fact/acc"].seed == 11_000_000
    assert found["world/acc"].n == n * len(world.TASKS)


def test_the_protocol_says_how(new_model: NewModel, tokenizer: PreTrainedTokenizerBase, made_up: Path) -> None:
    prompt = collaborative_prompt(with_input=False)
    (one,) = task_measurements(
        new_model(), tokenizer, "boolq", prompt=prompt, data_root=str(made_up), limit=2, batch_size=3
    )
    protocol = one.protocol
    assert one.name == "boolq/acc"
    assert (one.unit, one.how, one.n, one.seed) == ("share", "measured", 2, None)
    assert one.environment.versions["lm_eval"] in str(protocol["harness"])
    assert protocol["prompt"] == f"collaborative v1 {prompt.sha256[:12]}"
    assert isinstance(protocol["prompt_tokens"], int)
    assert protocol | {"harness": 0, "prompt": 0, "prompt_tokens": 0, "data": 0, "too_long": 0} == {
        "metric": "acc",
        "task": "boolq",
        "task_version": "2.0",
        "split": "validation",
        "shots": 0,
        "items": 5,
        "batch_size": 3,
        "max_length": 512,
        "bos": True,
        "limit": 2,
        "answer": None,
        "data_remark": "first 2,000 rows of 3,270",
        **dict.fromkeys(("harness", "prompt", "prompt_tokens", "data", "too_long"), 0),
    }


def test_prepared_tasks_serve_with_and_without_the_prompt(
    new_model: NewModel, tokenizer: PreTrainedTokenizerBase, made_up: Path
) -> None:
    model = new_model()
    ready = prepare(["commonsense", "boolq"], data_root=made_up)
    on = task_measurements(model, tokenizer, ready, prompt=collaborative_prompt(with_input=False))
    off = task_measurements(model, tokenizer, ready)
    assert [one.name for one in on] == [one.name for one in off]
    assert off == task_measurements(model, tokenizer, ["commonsense", "boolq"], data_root=str(made_up))
    assert {one.protocol["prompt"] for one in off} == {None}
    assert not any(first.same_protocol(second) for first, second in zip(on, off, strict=True))
    found = named(off)
    tasks = ("piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "storycloze")
    assert found["commonsense/acc"].value == pytest.approx(sum(found[f"{task}/acc"].value for task in tasks) / 7)
    normed = [found.get(f"{task}/acc_norm") or found[f"{task}/acc"] for task in tasks]
    assert found["commonsense/acc_norm"].value == pytest.approx(sum(one.value for one in normed) / 7)
    assert "winogrande/acc_norm" not in found
    assert found["commonsense/acc"].protocol["tasks"] == " ".join(tasks)


@pytest.mark.parametrize(("answer", "right"), [(" True", 1), ("True", 1), (" False", 0), (" True or so", 0)])
def test_a_generated_answer_counts_with_and_without_the_space_before_it(
    answer: str,
    right: int,
    new_model: NewModel,
    tokenizer: PreTrainedTokenizerBase,
    made_up: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def generate(self: PromptedLM, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        assert all("max_gen_toks" not in request.args[1] for request in requests)
        return [answer] * len(requests)

    monkeypatch.setattr(PromptedLM, "generate_until", generate)
    (one,) = task_measurements(new_model(2048), tokenizer, "bbh_boolean_expressions", data_root=str(made_up))
    assert (one.name, one.value) == ("bbh_boolean_expressions/exact_match", right)
    assert one.protocol["shots"] == 3
    assert one.protocol["answer"] == "whitespace around it removed"
    assert one.remark is None


def test_whole_shots_are_dropped_where_they_do_not_fit(
    new_model: NewModel, tokenizer: PreTrainedTokenizerBase, made_up: Path
) -> None:
    """The description and the first shots stay; the remark counts."""
    ready = prepare("mmlu_anatomy", data_root=made_up)
    (one,) = task_measurements(new_model(150), tokenizer, ready)
    task = ready[0].tasks[0].task
    contexts = [instance.args[0] for instance in task.instances if instance.idx == 0]
    assert one.remark is not None
    shown = [context.count("Shot") for context in contexts]
    assert all(0 < n < 5 for n in shown)
    assert one.remark == f"{len(contexts)} items lost {sum(5 - n for n in shown)} shots to fit"
    for context, n in zip(contexts, shown, strict=True):
        assert context.startswith("The following are multiple choice questions (with answers) about anatomy.")
        assert all(f"Shot {i} " in context for i in range(n))
        assert len(tokenizer.encode(context)) < 150
        next_shot = len(tokenizer.encode(context)) + len(
            tokenizer.encode("Shot 9 of anatomy?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: A\n\n")
        )
        assert next_shot > 150 - 3
    (whole,) = task_measurements(new_model(1024), tokenizer, ready)
    assert whole.remark is None
    (cut,) = task_measurements(new_model(24), tokenizer, ready)
    assert "items lost the oldest tokens of their context" in str(cut.remark)


@pytest.mark.parametrize("mode", [True, False])
def test_model_and_tokenizer_are_left_as_they_were(
    mode: bool, new_model: NewModel, tokenizer: PreTrainedTokenizerBase, made_up: Path
) -> None:
    model = new_model().train(mode)
    before = (tokenizer.model_max_length, tokenizer.pad_token, tokenizer.padding_side)
    task_measurements(model, tokenizer, "storycloze", data_root=str(made_up), device="cpu")
    assert model.training is mode
    assert before == (tokenizer.model_max_length, tokenizer.pad_token, tokenizer.padding_side)


def test_one_item_has_no_stderr(new_model: NewModel, tokenizer: PreTrainedTokenizerBase, made_up: Path) -> None:
    found = task_measurements(new_model(), tokenizer, "reading", data_root=str(made_up), limit=1)
    assert [one.stderr for one in found] == [None] * 3


def test_mmlu_is_the_mean_over_items(
    new_model: NewModel, tokenizer: PreTrainedTokenizerBase, made_up: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anatomy has twice as many rows as virology; the other subjects have none here."""
    two = ("mmlu_anatomy", "mmlu_virology")
    monkeypatch.setattr(
        "compresso.metrics.tasks.suites._yamls",
        lambda folder, _: [Path(f"{name}.yaml") for name in two] if "mmlu" in folder else [],
    )
    found = named(task_measurements(new_model(), tokenizer, "mmlu", data_root=str(made_up)))
    assert set(found) == {"mmlu/acc", *(f"{name}/acc" for name in two)}
    first, second = (found[f"{name}/acc"] for name in two)
    assert (first.n, second.n, found["mmlu/acc"].n) == (10, 5, 15)
    assert found["mmlu/acc"].value == pytest.approx((10 * first.value + 5 * second.value) / 15)
    assert found["mmlu/acc"].protocol["shots"] == 5


def test_impossible_numbers_and_prompts_are_refused(new_model: NewModel, tokenizer: PreTrainedTokenizerBase) -> None:
    model = new_model()
    for settings, message in (({"limit": 0}, "limit=0"), ({"batch_size": 0}, "batch_size=0")):
        with pytest.raises(DataError, match=message):
            task_measurements(model, tokenizer, "world", **settings)
    with pytest.raises(DataError, match=r"prompt v0 \(abc\) is unknown here"):
        task_measurements(model, tokenizer, "world", prompt=Prompt("Please.", "v0", "abc"))
