"""What the catalogue says of trust: every row names a stage that exists, what was found, and who found it."""

import json

from tests.conftest import Call

from compresso.commands.published_results import trust_costs
from compresso.stage import cards

PAPERS = {"arXiv 2403.15447", "arXiv 2401.10862"}


def test_rows_belong_to_stages_and_have_a_source() -> None:
    rows = {name: trust_costs(name) for name in cards()}
    assert {name for name, mine in rows.items() if any(row["by"] in PAPERS for row in mine)} == {
        "awq",
        "gptq",
        "magnitude",
        "sparsegpt",
        "wanda",
    }
    for row in (row for mine in rows.values() for row in mine):
        assert row["by"] in {*PAPERS, "compresso"} and all(row[key].strip() for key in ("what", "on", "found", "how"))
    assert any("attention" in row["what"] for row in rows["wanda"])
    assert not any("attention" in row["what"] for row in rows["sparsegpt"]), "it was tried with Wanda alone"


def test_papers_rows_are_marked_as_such() -> None:
    first = trust_costs("gptq")[0]
    assert first["by"] == "arXiv 2403.15447" and "no table was read" in first["how"]


def test_the_catalogue_prints_them(call: Call) -> None:
    shown = call("methods", "gptq")[1]
    assert "Trust, beside the dense model" in shown and "2403.15447" in shown
    assert "nobody has measured what it costs" in " ".join(call("methods", "recover")[1].split())
    (row,) = json.loads(call("methods", "wanda", "--json")[1])
    assert row["trust"] == trust_costs("wanda") != []
