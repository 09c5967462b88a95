"""A row a stage, of what it cost and left: in the terminal, on the page and in the card the same."""

from typing import Any

from compresso.report.card import model_card
from compresso.report.html import report_of_run
from compresso.report.stage_table import StageTable, stage_table
from tests.report import made


def left(parameters: int, loss: float | None, perplexity: float | None) -> dict[str, Any]:
    score = None if perplexity is None else made.number("held/perplexity", perplexity, stderr=0.5)
    return {
        "parameters": parameters,
        "macs_per_token": 2 * parameters,
        "held_loss": loss,
        "score": score and score.model_dump(mode="json"),
    }


def records(held: bool = True, **changes: Any) -> dict[str, Any]:
    """Of three stages; the last rounds."""
    model = made.dense(made.number("held/perplexity", 7.4, stderr=0.25)) if held else made.dense()
    facts = made.records(made.report_of(model, made.pruned()))
    number = {"learn_gates": (760, 2.5, 12.2), "recover": (760, 2.1, 8.2), "rtn": (760, 2.2, 9.0)}
    facts["stages"]["rtn"] = {"bits": 4.25, "seconds": 1.0}
    facts["recipe"]["stages"].append({"rtn": {"bits": 4}})
    for name, (parameters, loss, perplexity) in number.items():
        facts["stages"][name]["left"] = left(parameters, *((loss, perplexity) if held else (None, None)))
    if not held:
        facts["before"]["held_loss"] = None
    return facts | changes


def table(facts: dict[str, Any]) -> StageTable | None:
    return stage_table(made.checked(facts))


def test_each_stage_has_a_row_behind_the_dense_model() -> None:
    found = table(records())
    assert found is not None
    assert found.titles == (
        *("stage", "parameters", "MACs a token", "bits a weight", "held loss", "held perplexity", "took"),
    )
    assert found.rows == (
        ("dense", "1,000", "900", "", "2.0000", "7.40 ± 0.25", ""),
        ("learn_gates", "760", "1,520", "", "2.5000", "12.20 ± 0.50", "12 s"),
        ("recover", "760", "1,520", "", "2.1000", "8.20 ± 0.50", "2.2 min"),
        ("rtn", "760", "1,520", "4.25", "2.2000", "9.00 ± 0.50", "1 s"),
    )
    lines = found.lines()
    assert len({len(line) for line in lines if not line.startswith("dense")}) == 1
    assert lines[0].startswith("stage        parameters")
    assert lines[1].split() == ["dense", "1,000", "900", "2.0000", "7.40", "±", "0.25"]


def test_a_stage_that_makes_the_dense_model_takes_its_place() -> None:
    facts = records(dense={"name": "tiny, fine-tuned", "fingerprint": made.DENSE})
    found = table(facts)
    assert found is not None and [row[0] for row in found.rows] == ["learn_gates", "recover", "rtn"]


def test_zeros_have_a_column_and_what_nobody_measured_has_none() -> None:
    facts = records(held=False)
    facts["stages"]["recover"]["sparsity"] = 0.5
    found = table(facts)
    assert found is not None
    assert found.titles == ("stage", "parameters", "MACs a token", "zeros", "bits a weight", "took")
    assert found.rows[2][3] == "50.0 %" and found.rows[1][3] == ""


def test_one_stage_and_older_records_have_no_table() -> None:
    facts = records()
    del facts["stages"]["recover"]["left"]
    assert table(facts) is None
    facts = records()
    facts["stages"] = {"rtn": facts["stages"]["rtn"]}
    assert table(facts) is None
    text = model_card(made.checked(facts)) + report_of_run(made.checked(facts), made.PLAN)
    assert "Stage by stage" not in text and "#stages" not in text


def test_card_and_page_show_it() -> None:
    facts = made.checked(records())
    card = model_card(facts)
    assert "## Stage by stage\n\n| stage | parameters |" in card
    assert "| rtn | 760 | 1,520 | 4.25 | 2.2000 | 9.00 ± 0.50 | 1 s |" in card
    page = report_of_run(facts, made.PLAN)
    assert '<a href="#stages">Stages</a>' in page and '<section id="stages">' in page
    assert '<th scope="row">recover</th><td>760</td><td>1,520</td><td></td><td>2.1000</td>' in page


def test_a_stages_name_of_a_stranger_stays_text() -> None:
    facts = records()
    facts["stages"]["<script>alert(1)</script>"] = facts["stages"].pop("rtn")
    assert "<script" not in report_of_run(made.checked(facts), made.PLAN)


def test_multiply_accumulates_are_called_those_of_what_was_counted() -> None:
    facts = records()
    facts["before"]["macs_of"] = facts["after"]["macs_of"] = "picture"
    found = table(facts)
    assert found is not None and "MACs a picture" in found.titles and "MACs a token" not in found.titles
