"""Inputs are merged by the models they speak of; what cannot be read or compared is refused in one line."""

import itertools
from pathlib import Path

import pytest

from compresso.errors import CheckpointError
from compresso.metrics.record import Report
from compresso.report.read import comparison_of_run, labels, read_results
from compresso.report.records import RunRecords
from tests.report.made import (
    DENSE,
    NEW,
    OLD,
    PLAN,
    SMALL,
    SMALLER,
    dense,
    number,
    pruned,
    records,
    report_file,
    report_of,
    run_folder,
)


def test_one_model_in_two_inputs_is_one_subject_and_the_newer_number_counts(tmp_path: Path) -> None:
    again = pruned(perplexity=14.0).model_copy(update={"name": "evaluated"})
    old, new = (
        report_file(tmp_path / "old.json", dense(), pruned()),
        report_file(tmp_path / "new.json", again, created=NEW),
    )
    for order in itertools.permutations([old, new]):
        merged = read_results(order)
        assert [one.fingerprint for one in merged.models] == [DENSE, SMALL]
        assert merged.models[1].value("wikitext2/perplexity") == 14.0
        assert len(merged.models[1].measurements) == len(again.measurements)
        assert merged.created == NEW


def test_another_protocol_is_another_number(tmp_path: Path) -> None:
    other = pruned().model_copy(
        update={"measurements": (number("wikitext2/perplexity", 99, protocol={"seq_len": 128}),)}
    )
    paths = [
        report_file(tmp_path / "a.json", dense(), pruned()),
        report_file(tmp_path / "b.json", other, created=NEW),
    ]
    values = [one.value for one in read_results(paths).models[1].measurements if one.name == "wikitext2/perplexity"]
    assert values == [12.0, 99.0]


def test_dates_are_compared_as_dates(tmp_path: Path) -> None:
    later = pruned(perplexity=14.0)
    a = report_file(tmp_path / "a.json", dense(), pruned(), created="2026-01-01T12:00:00+02:00")
    b = report_file(tmp_path / "b.json", later, created="2026-01-01T11:00:00Z")
    assert read_results([b, a]).models[1].value("wikitext2/perplexity") == 14.0


def test_a_run_names_its_result_by_its_folder_and_its_base_dense(tmp_path: Path) -> None:
    one = run_folder(tmp_path / "one" / "out")
    two = run_folder(tmp_path / "two" / "out", records(report_of(dense(), pruned(fingerprint=SMALLER))))
    merged = read_results([two, one])
    assert [results.name for results in merged.models] == ["dense", "two/out", "one/out"]
    assert merged.dense == {DENSE}
    assert [run.result for run in merged.runs] == [SMALLER, SMALL]
    assert merged.dense_of(merged.models[1]) == merged.models[0]
    assert merged.dense_of(merged.models[0]) is None
    assert [run.name for run in read_results([one, one]).runs] == ["out"]


def test_a_result_pruned_again_is_compared_with_the_first_model(tmp_path: Path) -> None:
    first = run_folder(tmp_path / "first")
    facts = records(report_of(pruned().model_copy(update={"name": "dense"}), pruned(fingerprint=SMALLER)))
    second = run_folder(tmp_path / "second", {**facts, "model": {"name": "first", "fingerprint": SMALL}})
    merged = read_results([first, second])
    assert [one.name for one in merged.models] == ["dense", "first", "second"]
    assert merged.dense_of(merged.models[2]) == merged.models[0]


def test_accounts_of_different_models_meet_in_their_protocols(tmp_path: Path) -> None:
    paths = [report_file(tmp_path / "small.json", pruned()), report_file(tmp_path / "dense.json", dense())]
    merged = read_results(paths)
    assert [one.name for one in merged.models] == ["dense", "compresso"]
    assert merged.dense_of(merged.models[1]) == merged.models[0]


def test_names_are_unique(tmp_path: Path) -> None:
    made = [report_file(tmp_path / f"{i}.json", pruned("same", f"sha256:{i}{i}")) for i in range(3)]
    assert [one.name for one in read_results(made).models] == ["same", "same (1.json)", "same (2.json)"]


def test_what_is_merged_is_an_account_that_can_be_read_again(tmp_path: Path) -> None:
    merged = read_results([run_folder(tmp_path / "run")])
    path = tmp_path / "again.json"
    path.write_text(merged.report().model_dump_json())
    assert Report.model_validate_json(path.read_text()) == merged.report()
    assert read_results([path, tmp_path / "run"]).models == merged.models


def test_strangers_are_refused(tmp_path: Path) -> None:
    stranger = pruned("stranger", "sha256:99")
    apart = [one for one in stranger.measurements if one.how == "counted"]
    other = report_file(tmp_path / "other.json", stranger.model_copy(update={"measurements": tuple(apart)}))
    with pytest.raises(CheckpointError, match=r"^run and other.json have no model and no measured number") as caught:
        read_results([run_folder(tmp_path / "run"), other])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": None}, "model: "),
        ({"format": 1}, "format: "),
        ({"report": None}, "report: "),
        ({"layout": "round"}, "layout: "),
        ({"surprise": 1}, "surprise: "),
        ({"before": {"parameters": {"total": "many"}}}, "before.parameters.total: "),
        ({"stages": {"learn_gates": {"units_kept": {"hidden": "half"}}}}, "units_kept.hidden"),
        ({"guard": {"verdict": "perhaps"}}, "guard.verdict: "),
        ({"report": {"format": 2, "created": OLD, "models": [{"name": "x"}]}}, "report.models.0.model: "),
        ({"report": report_of(dense()).model_dump(mode="json")}, "no model beside the one the run started from"),
        (
            {"report": report_of(dense(), pruned(), created="yesterday").model_dump(mode="json")},
            "'yesterday' is not an ISO date",
        ),
    ],
)
def test_damaged_records_name_the_field(tmp_path: Path, change: dict[str, object], says: str) -> None:
    folder = run_folder(tmp_path / "run", {**records(), **change})
    with pytest.raises(CheckpointError) as caught:
        read_results([folder])
    assert str(folder / "records.json") in str(caught.value)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON"),
        ("[]", "a JSON object is wanted"),
        ("{}", "is not a report of measurements: created: is missing"),
        (report_of().model_dump_json(), "holds no measured model"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "numbers.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=says):
        read_results([path])


def test_a_damaged_plan_and_absent_inputs_are_refused(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    (folder / "plan.json").write_text('{"format": 1}')
    for paths, says in (
        ([folder], "plan.json cannot be read"),
        ([tmp_path / "nowhere"], "does not exist"),
        ([tmp_path], "has no records.json"),
        ([], "nothing to compare"),
    ):
        with pytest.raises(CheckpointError, match=says):
            read_results(paths)


def test_a_run_is_its_own_comparison(tmp_path: Path) -> None:
    made = comparison_of_run(RunRecords.checked(records(), "here"), PLAN)
    assert [one.name for one in made.models] == ["dense", "compresso"]
    assert made.runs[0].plan == PLAN


def test_labels_are_as_short_as_they_can_be() -> None:
    assert labels([Path("a/x/out"), Path("b/x/out"), Path("c")]) == ["a/x/out", "b/x/out", "c"]
    assert labels([Path("a"), Path("a")]) == ["a", "a"]


def test_bare_records_ask_for_their_folder() -> None:
    records = Path(__file__).parent / "release_0_1" / "records.json"
    with pytest.raises(CheckpointError, match=r"holds records of a run; give the folder .*release_0_1$"):
        read_results([records])
