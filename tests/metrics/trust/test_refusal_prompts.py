"""The loader of prompt files: 5 x 5 x 3 x 3 tasks, bare and in ten templates, and one line for any other shape."""

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from compresso.errors import DataError
from compresso.metrics.trust.refusal_prompts import benign_prompts, harmful_prompts, prompt_sets
from tests.metrics.trust.scripted import benign_tree, tree


def written(folder: Path, value: Any) -> Path:
    path = folder / "prompts.json"
    path.write_text(json.dumps(value))
    return path


def test_every_task_stands_in_every_template(tmp_path: Path) -> None:
    found = harmful_prompts(written(tmp_path, tree())).prompts
    assert len(found) == 2475 and len({one.id for one in found}) == 2475
    assert set(Counter(one.template for one in found).values()) == {225}
    assert set(Counter((one.category, one.severity) for one in found).values()) == {165}
    assert all(one.task in one.text for one in found)
    assert {one.task for one in found} == {one.text for one in found if one.template == "ORIGINAL"}


def test_yaml_packed_or_not_is_read_as_json_is(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.yaml", tmp_path / "b.yaml.gz"
    plain.write_text(yaml.safe_dump(tree(), sort_keys=False))
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert harmful_prompts(plain).prompts == harmful_prompts(packed).prompts
    assert harmful_prompts(plain).prompts == harmful_prompts(written(tmp_path, tree())).prompts


def test_benign_tasks_stand_in_the_same_templates(tmp_path: Path) -> None:
    found = benign_prompts(written(tmp_path, benign_tree())).prompts
    assert len(found) == 2475 and {one.category for one in found} == {"benign"}


def _without_template(value: dict[str, Any]) -> None:
    del value["T3"]


def _without_bare(value: dict[str, Any]) -> None:
    value["T11"] = value.pop("ORIGINAL")


def _one_task_less(value: dict[str, Any]) -> None:
    value["T0"]["category 0"]["topic 00"]["low"].pop()


def _number(value: dict[str, Any]) -> None:
    value["T0"]["category 0"]["topic 00"]["low"][1] = 5


def _blank(value: dict[str, Any]) -> None:
    value["T0"]["category 0"]["topic 00"]["low"][2] = " "


def _fourth_severity(value: dict[str, Any]) -> None:
    value["ORIGINAL"]["category 1"]["topic 10"]["extreme"] = ["a", "b", "c"]


def _other_task(value: dict[str, Any]) -> None:
    value["T9"]["category 4"]["topic 44"]["high"][2] = "T9 says: something else."


def _sixth_category(value: dict[str, Any]) -> None:
    value["T0"]["category 5"] = value["T0"]["category 0"]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_without_template, "10 templates; wanted ORIGINAL"),
        (_without_bare, "none of them ORIGINAL"),
        (_one_task_less, "T0, 'topic 00', 'low': wanted 3 texts, got 2"),
        (_number, "T0, 'topic 00', 'low': text 2 of 3 is \"5\"; wanted a text"),
        (_blank, "T0, 'topic 00', 'low': text 3 of 3 is an empty one; wanted a text"),
        (_fourth_severity, "wanted 3 severities by name, got 4"),
        (_other_task, "T9/4/4/2/2 does not hold the task"),
        (_sixth_category, "T0: wanted 5 categories by name, got 6"),
    ],
)
def test_another_shape_is_refused_where_it_differs(
    spoil: Callable[[dict[str, Any]], None], said: str, tmp_path: Path
) -> None:
    value: dict[str, Any] = tree()
    spoil(value)
    with pytest.raises(DataError) as caught:
        harmful_prompts(written(tmp_path, value))
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &x [1]\nb: *x\n", "alias"),
        ("[1, 2", "no plain YAML"),
        ("- a\n", "got a list"),
        ("a: 1", "1 templates"),
        ("a: 1\na: 2", "the key 'a' twice in one mapping .line 2.; keep one"),
    ],
)
def test_what_is_no_prompt_file_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=said):
        harmful_prompts(path)
    with pytest.raises(DataError, match="is no file"):
        harmful_prompts(tmp_path / "absent.yaml")


def test_a_task_stands_once_and_in_its_template(tmp_path: Path) -> None:
    twice: dict[str, Any] = tree()
    for template in twice:
        tasks = twice[template]["category 2"]["topic 21"]["medium"]
        tasks[1] = tasks[0]
    with pytest.raises(DataError, match="ORIGINAL/2/1/1/1 is the task that stands at ORIGINAL/2/1/1/0"):
        harmful_prompts(written(tmp_path, twice))
    bare: dict[str, Any] = tree()
    bare["T4"] = bare["ORIGINAL"]
    with pytest.raises(DataError, match="T4/0/0/0/0 is the bare task, as under ORIGINAL; wanted it in"):
        harmful_prompts(written(tmp_path, bare))


def test_both_files_have_the_same_templates(tmp_path: Path) -> None:
    benign = tmp_path / "benign.json"
    benign.write_text(json.dumps(benign_tree()))
    harmful = written(tmp_path, tree())
    assert [len(one.prompts) for one in prompt_sets(harmful, benign)] == [2475, 2475]
    other: dict[str, Any] = benign_tree()
    benign.write_text(json.dumps({{"T7": "T77"}.get(name, name): texts for name, texts in other.items()}))
    with pytest.raises(DataError, match=r"--benign benign.json: template T77 is none of --prompts prompts.json"):
        prompt_sets(harmful, benign)
