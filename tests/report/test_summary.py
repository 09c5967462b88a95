"""The five lines that a run ends with."""

from pathlib import Path
from typing import Any

from compresso.metrics.record import ModelResults, Report
from compresso.report.records import RunRecords
from compresso.report.summary import summary
from tests.report import made


def lines(records: RunRecords) -> dict[str, str]:
    """The lines by the words before two spaces."""
    said = summary(records, Path("some/small"))
    assert len(said) == 5
    return {name: words.strip() for name, _, words in (line.partition("  ") for line in said)}


def with_numbers(records: RunRecords, dense: tuple[object, ...], pruned: tuple[object, ...]) -> RunRecords:
    models = [
        ModelResults.model_validate(
            model.model_dump() | {"measurements": numbers, "not_measured": {"speed": "asked not to"}}
        )
        for model, numbers in zip(records.report.models, (dense, pruned), strict=True)
    ]
    return records.model_copy(update={"report": Report(created=made.NEW, models=tuple(models))})


def test_each_line_has_both_models(tmp_path: Path) -> None:
    records = made.checked(made.records())
    held = {"corpus": "data", "examples": 32}
    records = with_numbers(
        records,
        (*made.dense().measurements, made.number("held/perplexity", 10.0, protocol=held, stderr=0.2)),
        (*made.pruned().measurements, made.number("held/perplexity", 21.5, protocol=held, stderr=0.4)),
    )
    said = lines(records)
    before, after = records.before.parameters["total"], records.after.parameters["total"]
    assert said["parameters"] == f"{before:,} -> {after:,} ({100 * after / before:.1f} %)"
    assert said["bytes"].startswith("4 kB -> 2.8 kB (70.0 %)")
    assert (
        said["held perplexity"]
        == "10.00 ± 0.20 -> 21.50 ± 0.40, on 32 held-out examples; guard: " + records.guard.verdict
    )
    assert said["decoding"].startswith("100.0 -> 90.0 tokens/s, 0.90 x (bytes allow 1.40 x)")
    assert "some/small" in said["written"] and "report.html" in said["written"] and "README.md" in said["written"]


def test_a_model_of_pictures_ends_with_frames_and_memory() -> None:
    given: dict[str, Any] = made.records()
    given["recipe"] = {**given["recipe"], "task": "segmentation"}
    found = [
        (made.number("frames", n, unit="frames/s"), made.number("memory/peak", peak, unit="bytes"))
        for n, peak in ((15.0, 5e8), (30.0, 4e8))
    ]
    records = with_numbers(
        made.checked(given), found[0], (*found[1], made.number("frames_speedup", 2.0, unit="1", low=1.5, high=2.5))
    )
    said = {
        name: words.strip() for name, _, words in (line.partition("  ") for line in summary(records, Path("small")))
    }
    assert said["frames"] == "15.0 -> 30.0 frames/s, 2.00 x (1.50 to 2.50 over rounds)" and "decoding" not in said
    assert said["memory"] == "500 MB -> 400 MB of a process that reads one picture"
    told = summary(with_numbers(made.checked(given), (), ()), Path("small"))
    assert any(line.startswith("frames") and "not measured" in line for line in told)
    assert any(line.startswith("memory") and "not measured" in line for line in told)


def test_what_was_not_measured_says_why() -> None:
    said = lines(with_numbers(made.checked(made.records()), (), ()))
    assert said["decoding"] == "not measured: asked not to"
    assert said["held perplexity"].startswith("not measured: ")
    assert said["bytes"].startswith("not counted")
