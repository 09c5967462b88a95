"""Names: what a suite holds, what is near an unknown one, and that the world's YAMLs are ordinary ones."""

from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

from compresso.data import world
from compresso.errors import DataError, ResourceError
from compresso.metrics.tasks import suites
from compresso.metrics.tasks.quiet import quiet
from compresso.metrics.tasks.suites import SUITES, WORLD_YAMLS, suites_of


def names(suite: str, root: Path | None = None) -> list[str]:
    return [bench.name for bench in suites_of(suite, root)[0].benches]


def test_suites_hold_what_they_promise(made_up: Path, tmp_path: Path) -> None:
    plain = ["piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]
    assert names("commonsense") == names("commonsense", tmp_path) == plain
    assert names("commonsense", made_up) == [*plain, "storycloze"]
    assert names("reading") == ["boolq", "race"]
    assert len(names("mmlu")) == 57
    assert {bench.shots for bench in suites_of("mmlu")[0].benches} == {5}
    assert len(names("bbh")) == 27
    assert {bench.shots for bench in suites_of("bbh")[0].benches} == {3}
    assert names("world") == [f"world_{task}" for task in world.TASKS]
    assert [suite.weights for suite in suites_of(SUITES)] == ["tasks", "tasks", "items", "items", "tasks"]


def test_every_yaml_is_there() -> None:
    for suite in suites_of(SUITES):
        for bench in suite.benches:
            assert bench.path.is_file()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("pica", "no task or suite 'pica'; did you mean 'piqa'?"),
        ("comonsense", "did you mean 'commonsense'?"),
        ("mmlu_anatomi", "did you mean 'mmlu_anatomy'?"),
        (["piqa", "world_date", "piqa"], "task 'piqa' is asked for twice in piqa, world_date, piqa"),
        (["commonsense", "arc_easy"], "task 'arc_easy' is asked for twice"),
        ([], "no task was named; known suites: commonsense, reading, mmlu, bbh, world"),
    ],
)
def test_unknown_and_repeated_names_are_refused(asked: str | list[str], message: str) -> None:
    with pytest.raises(DataError, match=message.replace("?", r"\?")):
        suites_of(asked)


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "find_spec", lambda _: None)
    with pytest.raises(ResourceError, match=r"pip install 'compresso-llm\[evaluate\]'"):
        suites_of("world")


def test_the_harness_runs_the_world_by_its_group() -> None:
    with quiet():
        loaded = TaskManager(include_path=str(WORLD_YAMLS), include_defaults=False).load("world")
    assert sorted(loaded["tasks"]) == sorted(names("world"))
    assert set(loaded["groups"]) == {"world"}
    task = loaded["tasks"]["world_fact"]
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(limit=1)
    item = world.items("fact", 200, 11_000_000)[0]
    context, continuation = task.instances[item.answer].args
    assert context == f"###User Instruction:\n{item.instruction}\n\n### Response:"
    assert continuation == item.choices[item.answer]
