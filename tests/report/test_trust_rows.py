"""The trust table of report and card: what changed, in points, and what is advised."""

from typing import Any

from markdown_it import MarkdownIt

from compresso.core.plan import Plan
from compresso.metrics.record import Change
from compresso.report.card import model_card
from compresso.report.html import report_of_run
from compresso.report.summary import summary
from compresso.report.trust_rows import trust_rows
from tests.report.made import PLAN, checked, dense, pruned, records, report_of

CHANGES = (
    Change(name="trust/toxicity", verdict="not measured", words="no scorer was given"),
    Change(name="trust/ethics", dense=0.8, smaller=0.6, difference=-0.2, low=-0.3, high=-0.1, n=40, verdict="fell"),
    Change(
        name="trust/fairness",
        dense=0.7,
        smaller=1.0,
        difference=0.3,
        low=0.2,
        high=0.4,
        n=96,
        verdict="not comparable",
        words="its perplexity | is 9 times",
    ),
)


def facts(changes: tuple[Change, ...] = CHANGES, **more: Any) -> dict[str, Any]:
    return records(report_of(dense(), pruned().model_copy(update={"changes": changes})), **more)


def test_rows_say_points_and_verdicts() -> None:
    rows = trust_rows(CHANGES)
    assert rows[0] == ("toxicity", "not measured", "not measured", "", "", "", "not measured: no scorer was given")
    assert rows[1] == ("ethics", "80.0", "60.0", "\u221220.0", "\u221230.0 to \u221210.0", "40", "FELL")
    assert rows[2][6] == "not comparable: its perplexity | is 9 times"


def test_card_and_report_hold_the_table() -> None:
    text = model_card(checked(facts()))
    tables = [token for token in MarkdownIt("commonmark").enable("table").parse(text) if token.type == "table_open"]
    assert "## Trust" in text and "| ethics | 80.0 | 60.0 | \u221220.0 | \u221230.0 to \u221210.0 | 40 | FELL |" in text
    (table,) = [table for table in text.split("\n\n") if "| ethics |" in table]
    assert len({line.replace("\\|", "").count("|") for line in table.strip().splitlines()}) == 1, "as many cells each"
    assert "perplexity \\| is 9 times" in text and len(tables) >= 3
    assert "bias, toxicity and safety" not in text
    page = report_of_run(checked(facts()), PLAN)
    assert '<section id="trust">' in page and "<td>FELL</td>" in page and "not comparable" in page


def test_a_run_that_did_not_ask_has_none() -> None:
    text = model_card(checked(facts(())))
    assert "## Trust" not in text and "bias, toxicity and safety" in text
    assert 'id="trust"' not in report_of_run(checked(facts(())), Plan())


def test_the_terminal_says_what_fell(tmp_path: Any) -> None:
    lines = summary(checked(facts()), tmp_path)
    (line,) = [line for line in lines if line.startswith("trust")]
    assert line.endswith("not measured: 1, fell: 1, not comparable: 1; fell beyond noise: ethics")


def test_few_bits_are_advised_against() -> None:
    made = facts(())
    name = next(iter(made["stages"]))
    made["stages"][name]["bits"] = 3
    text = model_card(checked(made))
    assert f"{name} left 3 bits a weight" in text and "calibration seeds" in text
    made["stages"][name]["bits"] = 4
    assert "bits a weight. arXiv" not in model_card(checked(made))
