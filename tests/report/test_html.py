"""The page without a browser: whole, small, self-contained, and nobody's markup but ours."""

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from compresso.core.plan import Plan
from compresso.errors import ExportError
from compresso.metrics.record import Measurement, Sample
from compresso.report.card import model_card
from compresso.report.cures import TRAINED_FOR
from compresso.report.html import page, report_of_run, write_report
from compresso.report.read import read_results
from compresso.stage import cards
from compresso.wording import SHARES
from tests.report.made import PLAN, checked, curves, dense, number, pruned, records, report_file, report_of, run_folder

EVIL = """</style></svg><script>alert("x")</script><img src=http://evil.test/x onerror=alert(1)>{{ 7 * 7 }}\x1b\x00"""


class Reader(HTMLParser):
    """Tags with attributes, ids, headings and visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def safe(text: str) -> Reader:
    """A page that asks for nothing and runs nothing."""
    seen = Reader(text)
    assert not {tag for tag, _ in seen.tags} & {"script", "img", "iframe", "object", "embed", "form", "base"}
    assert not [name for _, attributes in seen.tags for name in attributes if name.startswith("on")]
    links = [
        value
        for _, attributes in seen.tags
        for name, value in attributes.items()
        if name in ("href", "src", "xlink:href")
    ]
    assert all(str(link).startswith("#") or link == "data:," for link in links), links
    assert "url(" not in text and "@import" not in text
    ids = [attributes["id"] for _, attributes in seen.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {str(link)[1:] for link in links if str(link).startswith("#")} <= set(ids)
    return seen


def test_a_share_that_is_none_of_parameters_is_said_as_such() -> None:
    """Every stage whose `keep` counts none of the model's numbers has its own words, on the page, too."""
    own = {name for name, one in cards().items() if "keep" in one.knobs and "of" not in one.knobs}
    assert own == set(SHARES)
    facts = records(report_of(dense(), pruned()))
    facts["recipe"]["stages"] = [{"filter_pruning": {"keep": 0.5, "kinds": ["channel"]}}]
    facts["stages"] = {"filter_pruning": {"seconds": 1.0}}
    seen = safe(report_of_run(checked(facts), PLAN))
    assert "filter_pruning keeps 50 % of each layer's channels; what may leave" in seen.text


def test_the_page_of_a_run_says_everything() -> None:
    seen = safe(
        report_of_run(checked(records(report_of(dense(), pruned(remark="no speed-up: zeros are stored dense")))), PLAN)
    )
    for words in (
        "learn_gates keeps 70 % of the block parameters; what may leave: heads, FFN units",
        "70.0 % of the block parameters, 76.0 % of all parameters",
        "rows.jsonl, 48 rows (text, 48 examples, 960 tokens)",
        "has lost much",
        "no speed-up: zeros are stored dense",
        "+20.0 % · beyond noise",
        "−5.0 points · within noise",
        "Noise floor: not measured.",
        "not verified here",
        "trust_remote_code=True",
        "compresso run recipe.yaml --model tiny --data rows.jsonl --layout native --seed 3 --output compresso-again",
        "sha256 " + "c" * 64,
        "torch 2.13.0",
        "seq_len: 2048",
        "removed in the end",
        "lambda2",
        "a dog.",
        "broken: it loops",
        "3 of 4",
        "all removed",
    ):
        assert words in seen.words, words
    assert seen.tags[0] == ("html", {"lang": "en"})
    levels = [int(tag[1]) for tag, _ in seen.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(levels))
    drawings = [attributes for tag, attributes in seen.tags if tag == "svg"]
    assert len(drawings) == 9  # heat map; sparsity, multipliers, two losses; two qualities against size and speed
    assert all(one.get("role") == "img" and one.get("aria-label") for one in drawings)


def test_a_name_from_outside_is_text_everywhere(tmp_path: Path) -> None:
    facts = records(model=EVIL)
    facts["recipe"] |= {"name": EVIL, "title": EVIL, "description": EVIL, "paper": EVIL}
    facts["data"]["source"] = EVIL
    facts["guard"]["checks"][0]["words"] = EVIL
    facts["versions"][EVIL] = EVIL
    facts["stages"]["learn_gates"]["curve"][EVIL] = [1.0] * 20
    texts = (Sample(prompt=EVIL, text=EVIL, tokens=1, repetition=0, degenerate=True),)
    evil = pruned(EVIL, remark=EVIL).model_copy(update={"samples": texts})
    strange = number(f"{EVIL}/perplexity", 3.0, protocol={EVIL: EVIL}, hardware=EVIL)
    facts["report"] = report_of(dense(strange), evil).model_dump(mode="json")
    seen = safe(report_of_run(checked(facts), PLAN))
    assert "{{ 7 * 7 }}" in seen.text and 'alert("x")' in seen.text


@pytest.mark.slow
def test_a_large_comparison_stays_below_two_megabytes(tmp_path: Path) -> None:
    n_layers, runs = 48, []
    plan = Plan({f"layers.{i}.{part}": tuple(range(5)) for i in range(n_layers) for part in ("heads", "channels")})
    units = dict.fromkeys(plan.kept, "5/32")
    text = tuple(
        Sample(prompt=f"Prompt {i}", text="word " * 60, tokens=60, repetition=0.1, degenerate=False) for i in range(10)
    )
    tasks = tuple(
        number(f"task{i}/{kind}", 0.5, "share", protocol={"shots": 0})
        for i in range(20)
        for kind in ("acc", "acc_norm")
    )
    for i in range(8):
        mine = pruned(fingerprint=f"sha256:{i:064d}").model_copy(update={"samples": text})
        facts = records(
            report_of(dense(*tasks), mine.model_copy(update={"measurements": (*mine.measurements, *tasks)}))
        )
        facts["stages"]["learn_gates"] |= {"units_kept": units, "curve": curves(200)}
        runs.append(run_folder(tmp_path / f"run{i}", facts, plan))
    write_report(tmp_path / "report.html", read_results(runs))
    assert 500_000 < (tmp_path / "report.html").stat().st_size < 2_000_000


def test_without_runs_and_without_dense_the_page_says_what_is_absent(tmp_path: Path) -> None:
    seen = safe(page(read_results([report_file(tmp_path / "one.json", pruned())])))
    assert "No dense model is among the inputs" in seen.words
    assert "What was asked" not in seen.words
    bare = pruned().model_copy(update={"measurements": (), "samples": ()})
    seen = safe(page(read_results([report_file(tmp_path / "two.json", bare)])))
    for words in (
        "Nothing was counted or timed",
        "no model was asked to write",
        "fewer than two models",
        "Not measured: Size, Perplexity",
    ):
        assert words in seen.words


def test_only_a_report_is_replaced(tmp_path: Path) -> None:
    comparison = read_results([report_file(tmp_path / "one.json", dense(), pruned())])
    target = tmp_path / "report.html"
    write_report(target, comparison)
    write_report(target, comparison)
    mine = tmp_path / "mine.html"
    mine.write_text("<p>mine</p>")
    for path, says in (
        (mine, "is not a report"),
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "r.html", "there is no folder"),
    ):
        with pytest.raises(ExportError, match=says):
            write_report(path, comparison)
    assert mine.read_text() == "<p>mine</p>"


def test_the_page_holds_what_the_json_holds(tmp_path: Path) -> None:
    """Every number of the report stands in the page, as the tables write it."""
    comparison = read_results([run_folder(tmp_path / "run")])
    words = safe(page(comparison)).words
    for results in json.loads(comparison.report().model_dump_json())["models"]:
        assert results["name"] in words
        for one in results["measurements"]:
            assert one["name"] in words, one["name"]


def of_classifier(*measured: Measurement) -> dict[str, Any]:
    """Records of a classifier of texts whose weights were rounded and lost nothing."""
    both = [number("held/acc", 0.5, "share"), *measured]
    rounded = pruned("pruned").model_copy(update={"model": "w4a4"})
    models = [one.model_copy(update={"measurements": tuple(both)}) for one in (dense(), rounded)]
    facts = records(report_of(*models))
    facts["recipe"] |= {"task": "classification", "stages": [{"qat": {"weight_bits": 4}}]}
    facts["stages"] = {"qat": {"bits": 4.03, "seconds": 1.0, "weights_kept": 1.0}}
    return facts


def test_what_was_only_rounded_is_not_called_pruned() -> None:
    """Nowhere on the page or the card, though the records call the second model so."""
    facts = of_classifier()
    facts["guard"] = {"verdict": "ok", "checks": []}
    plan = Plan({})
    seen = safe(report_of_run(checked(facts), plan))
    told = seen.words + model_card(checked(facts))
    assert (
        "w4a4, quantised" in seen.words
        and "compresso compare w4a4" in seen.words
        and "no unit of it was removed" in seen.words
    )
    assert not re.search(r"(?i:prun|smaller model)|What was removed", told)


def test_only_commands_that_take_the_model_are_named(tmp_path: Path) -> None:
    """`compresso measure` and perplexities are of models that write text; classifiers are scored on examples."""
    seen = safe(report_of_run(checked(of_classifier()), Plan({})))
    assert "compresso measure" not in seen.words
    assert (
        "No command measures more" in seen.words and "than compresso evaluate --task classification does" in seen.words
    )
    texts = safe(report_of_run(checked(records(report_of(dense(), pruned()))), PLAN))
    assert "compresso evaluate and compresso measure do that" in texts.words
    scored = dense().model_copy(
        update={"measurements": (number("rows/acc", 0.5, "share", protocol={TRAINED_FOR: "classification"}),)}
    )
    alone = safe(page(read_results([report_file(tmp_path / "one.json", scored)])))
    assert "compresso measure" not in alone.words


def test_numbers_of_a_row_are_written_alike() -> None:
    facts = records(report_of(dense(number("c4/perplexity", 11190.4)), pruned()))
    facts["report"]["models"][1]["measurements"].append(number("c4/perplexity", 2798.6).model_dump(mode="json"))
    seen = safe(report_of_run(checked(facts), PLAN))
    assert "11,190" in seen.words and "2,799" in seen.words and "e+04" not in seen.words
