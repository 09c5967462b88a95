"""Where rows come from: files, the package, the hub; and one clear line when they come from nowhere."""

from pathlib import Path
from typing import Any

import datasets
import pytest
from tests.metrics.tasks.conftest import MADE_UP, write_rows

from compresso.errors import DataError
from compresso.metrics.tasks.copies import FOLDER
from compresso.metrics.tasks.ready import prepare


def test_the_environment_names_the_data_root(made_up: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESSO_DATA", str(made_up))
    suite = prepare("reading")[0]
    assert suite.name == "reading"
    assert [ready.data["data"].rsplit(" ", 1)[0] for ready in suite.tasks] == [
        "local boolq_validation_2000.jsonl.gz",
        "local race_high_500.jsonl.gz",
    ]
    assert suite.tasks[0].data["data_remark"] == "first 2,000 rows of 3,270"


@pytest.mark.parametrize("rooted", [False, True])
def test_without_files_or_hub_it_ends_at_once_and_names_both(
    rooted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(path: str, name: str | None = None, **_: object) -> Any:
        assert datasets.config.HF_HUB_OFFLINE  # so nothing is tried again and again
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError) as found:
        prepare("piqa", data_root=tmp_path if rooted else None)
    message = str(found.value)
    assert message.startswith("task 'piqa': data set baber/piqa is not in the local cache, and HF_HUB_OFFLINE is set.")
    wanted = FOLDER / "piqa_validation.jsonl.gz"
    assert (
        f"Put {tmp_path / wanted} there" if rooted else f"Give --data-root (or COMPRESSO_DATA) with {wanted},"
    ) in message
    assert len(message.splitlines()) == 1


def test_storycloze_is_not_asked_of_the_hub() -> None:
    with pytest.raises(
        DataError, match=r"'storycloze' is not on the hub. Give --data-root .*storycloze_2018_validation\.jsonl\.gz"
    ):
        prepare("storycloze")


def test_rows_of_the_hub_are_the_harness_s(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, name: str | None = None, **_: object) -> datasets.DatasetDict:
        assert (path, name) == ("SaylorTwift/bbh", "navigate")
        return datasets.DatasetDict({"test": datasets.Dataset.from_list([{"input": "Left", "target": "No"}])})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (ready,) = prepare("bbh_navigate")[0].tasks
    assert ready.data == {"data": "hub SaylorTwift/bbh"}
    ready.task.build_all_requests()
    context = ready.task.instances[0].args[0]
    assert context.endswith("Q: Left\nA:")
    assert context.count("Q: ") == 4


def test_a_missing_data_root_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        prepare("piqa", data_root=tmp_path / "no")


def test_shots_need_examples_that_are_not_scored(made_up: Path) -> None:
    with pytest.raises(DataError, match="task 'piqa' has no examples for 2 shots in its local file"):
        prepare("piqa", data_root=made_up, num_fewshot=2)
    (ready,) = prepare("mmlu_anatomy", data_root=made_up, num_fewshot=2)[0].tasks
    assert ready.shots == 2
    ready.task.build_all_requests(limit=1)
    assert ready.task.instances[0].args[0].count("Shot") == 2
    with pytest.raises(DataError, match="num_fewshot=-1"):
        prepare("mmlu_anatomy", data_root=made_up, num_fewshot=-1)


def test_half_a_data_root_names_the_missing_file(tmp_path: Path) -> None:
    write_rows(tmp_path, "mmlu_test", MADE_UP["mmlu_test"])
    with pytest.raises(DataError, match=r"Put .*mmlu_dev\.jsonl\.gz there"):
        prepare("mmlu_anatomy", data_root=tmp_path)
