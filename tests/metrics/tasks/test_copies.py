"""Local files against the hub: the harness's own YAML on rows in the hub's form builds the same requests,
item by item.
"""

import ast
import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from lm_eval.tasks import TaskManager
from tests.metrics.tasks.conftest import MADE_UP, write_rows

from compresso.errors import DataError
from compresso.metrics.tasks.copies import FOLDER
from compresso.metrics.tasks.ready import prepare
from compresso.metrics.tasks.suites import Bench, suites_of

LOCAL = os.environ.get("COMPRESSO_DATA")
SINGLE = (
    *("piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge"),
    *("openbookqa", "storycloze", "boolq", "race", "lambada"),
)
PARTS = ("mmlu_anatomy", "mmlu_virology", "bbh_boolean_expressions", "bbh_navigate")


def bench_of(name: str) -> Bench:
    return suites_of(name)[0].benches[0]


def rows_of(root: Path, file: str) -> list[dict[str, Any]]:
    with gzip.open(root / FOLDER / file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def as_on_the_hub(name: str, root: Path, bench: Bench) -> datasets.DatasetDict:
    """All splits that the harness's YAML opens, rows in the form of the hub; splits that are only opened get the same
    rows.
    """
    assert bench.copy is not None
    splits: dict[str, list[dict[str, Any]]] = {}
    for split, file in bench.copy.files.items():
        rows = rows_of(root, file)
        if name.startswith("mmlu_"):
            rows = [row for row in rows if row["subject"] == name.removeprefix("mmlu_")]
        if name.startswith("bbh_"):
            rows = [
                {"input": row["input"], "target": row["target"]}
                for row in rows
                if row["task"] == name.removeprefix("bbh_")
            ]
        if name == "race":
            problems = [
                [{"question": row["question"], "answer": row["answer"], "options": row["options"]}] for row in rows
            ]
            rows = [{"article": row["article"], "problems": str(one)} for row, one in zip(rows, problems, strict=True)]
            assert ast.literal_eval(rows[0]["problems"]) == problems[0]
        splits[split] = rows
    evaluated = splits.get("test") or splits["validation"]
    return datasets.DatasetDict(
        {s: datasets.Dataset.from_list(splits.get(s, evaluated)) for s in ("train", "validation", "test", "dev")}
    )


def original(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The harness's task, from its own YAML; only the library that fetches rows is replaced."""
    bench = bench_of(name)

    def load_dataset(path: str, name: str | None = None, **_: object) -> datasets.DatasetDict:
        assert path == (bench.hub or "LSDSem/story_cloze")
        return as_on_the_hub(bench.name, root, bench)

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", load_dataset)
        (task,) = TaskManager(include_defaults=False).load(str(bench.path))["tasks"].values()
    task.set_config(key="num_fewshot", value=bench.shots)
    task.set_fewshot_seed(seed=0)
    return task


def requests(task: Any, validation: bool) -> Iterator[tuple[object, ...]]:
    """Everything that a request and its scoring are made of; storycloze has a test split on the hub, but no answers in
    it.
    """
    if validation:
        task.config.test_split = None
    task.build_all_requests()
    for one in task.instances:
        yield one.doc_id, one.idx, one.request_type, one.arguments, str(task.doc_to_target(one.doc))
    yield task.OUTPUT_TYPE, json.dumps(task.config.metric_list), task.config.generation_kwargs


def assert_same_requests(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (ready,) = prepare(name, data_root=root)[0].tasks
    theirs = list(requests(original(name, root, monkeypatch), validation=name == "storycloze"))
    ours = list(requests(ready.task, validation=False))
    assert len(ours) > 2
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == other


@pytest.mark.parametrize("name", [*SINGLE, *PARTS])
def test_requests_are_those_of_the_harness(name: str, made_up: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same_requests(name, made_up, monkeypatch)


@pytest.mark.slow
@pytest.mark.skipif(not LOCAL, reason="COMPRESSO_DATA: no folder with local copies")
@pytest.mark.parametrize("name", [*SINGLE, *PARTS])
def test_requests_of_the_real_files_are_those_of_the_harness(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(str(LOCAL))
    if (missing := bench_of(name).copy.missing(root)) is not None:  # type: ignore[union-attr]
        pytest.skip(f"COMPRESSO_DATA: no {missing.name}")
    assert_same_requests(name, root, monkeypatch)


def test_the_made_up_rows_would_show_a_difference(made_up: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: another row gives another request."""
    (ready,) = prepare("piqa", data_root=made_up)[0].tasks
    task = original("piqa", made_up, monkeypatch)
    task.task_docs = task.dataset["validation"] = task.dataset["validation"].map(
        lambda row: {"goal": row["goal"] + "!"}
    )
    assert list(requests(task, False)) != list(requests(ready.task, False))


@pytest.mark.parametrize("name", [*SINGLE, *PARTS])
def test_the_data_set_named_for_the_hub_is_the_one_in_the_yaml(name: str, made_up: Path) -> None:
    (ready,) = prepare(name, data_root=made_up)[0].tasks
    assert ready.task.config.dataset_path == (ready.bench.hub or "LSDSem/story_cloze")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"goal": "a", "sol1": "b", "sol2": "c", "label": 0}\n{"goal"', r"piqa_validation\.jsonl\.gz:2: not JSON"),
        ("[1]\n", r":1: not a JSON object"),
        ('{"goal": "a", "sol1": "b", "label": 0}\n', r"row 1 lacks sol2"),
        ("\n", r"no row; fetch"),
    ],
)
def test_malformed_files_are_refused_with_the_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / FOLDER / "piqa_validation.jsonl.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(text.encode()))
    with pytest.raises(DataError, match=message):
        prepare("piqa", data_root=tmp_path)
    path.write_bytes(b"not gzip")
    with pytest.raises(DataError, match=r"broken gzip data .*; fetch or compress the file again"):
        prepare("piqa", data_root=tmp_path)


def test_a_subject_without_rows_is_refused(made_up: Path) -> None:
    with pytest.raises(DataError, match=r"mmlu_test\.jsonl\.gz: no row with subject='marketing'"):
        prepare("mmlu_marketing", data_root=made_up)


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    rows = list(MADE_UP["piqa_validation"])
    write_rows(tmp_path, "piqa_validation", rows)
    assert len(prepare("piqa", data_root=tmp_path)[0].tasks[0].task.eval_docs) == len(rows)
    write_rows(tmp_path, "piqa_validation", rows[:3])
    assert len(prepare("piqa", data_root=tmp_path)[0].tasks[0].task.eval_docs) == 3
