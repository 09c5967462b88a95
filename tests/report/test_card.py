"""The model card says what the records say and no more, and the hub's own reader understands it."""

import html
import re
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from compresso.report.card import model_card
from tests.report.made import TASK, TEXT, checked, dense, number, pruned, records, report_of


def card(facts: dict[str, Any]) -> str:
    return model_card(checked(facts))


def front(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_hub_reads_the_results() -> None:
    text = card(records(model="owner/name-1B"))
    data = ModelCard(text).data
    found = {(one.dataset_type, one.metric_type): one for one in data.eval_results or ()}
    assert set(found) == {("Salesforce/wikitext", "perplexity"), ("piqa", "accuracy")}
    perplexity = found["Salesforce/wikitext", "perplexity"]
    assert (perplexity.metric_value, perplexity.dataset_split, perplexity.dataset_config) == (
        12.0,
        "test",
        "wikitext-2-raw-v1",
    )
    assert perplexity.metric_args == {**TEXT, "stderr": 0.05, "n": 1000}
    assert found["piqa", "accuracy"].metric_args == {**TASK, "stderr": 0.05, "n": 50, "seed": 0}
    assert (data.base_model, data.library_name, data.pipeline_tag) == (
        "owner/name-1B",
        "transformers",
        "text-generation",
    )
    assert data.to_dict()["base_model_relation"] in {"adapter", "merge", "quantized", "finetune"}
    assert "pruned" in data.tags and data.license is None


@pytest.mark.parametrize("name", ["tiny", "gpt2", "a b/c", "../owner/name", "a/b/c"])
def test_only_an_owner_on_the_hub_makes_a_base_model(name: str) -> None:
    head = front(card(records(model=name)))
    assert "base_model" not in head and "base_model_relation" not in head


def test_hostile_names_stay_text() -> None:
    name = 'x"\n---\nlicense: mit\n`|<script>alert(1)</script>'
    text = card(records(model=name))
    assert text.count("\n---\n") == 1
    assert "license" not in front(text)
    assert "<script>" not in text.split("---\n", 2)[2]


@pytest.mark.parametrize(
    "name",
    [
        "[free money](http://evil.test/x)",
        "![](https://evil.test/x.png)",
        "https://evil.test/x",
        "www.evil.test",
        "a@evil.test",
        "mailto:a@evil.test",
        "&#91;x&#93;(http://evil.test)",
        "h&#116;tps&#58;//evil.test",
        "<http://evil.test>",
        "\\[x](http://evil.test)",
        "[x][1] [1]: http://evil.test",
        "**bold** |[x](//evil.test)|",
        "# [x](http://evil.test)",
        "`[x](http://evil.test)",
        "\u202e[x](http://evil.test)",
    ],
)
def test_a_name_becomes_no_link(name: str) -> None:
    """Wherever it stands: in the title, a table, a list of what was not measured, an engine's words."""
    results = pruned(remark=name).model_copy(update={"not_measured": {name: name}})
    facts = records(report_of(dense(), results), model=name)
    facts["recipe"]["name"] = name
    facts["engines"] = [{"engine": name, "opens": "no", "reason": name}]
    text = card(facts)
    body = text.split("---\n", 2)[2]
    assert body.count("evil") > 5 or "evil" not in name
    outside = re.sub(r"`[^`]*`", "", body)
    assert not re.search(r"://|www\.|\w@\w|mailto:", html.unescape(outside))
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    inline = [one.type for token in tokens for one in token.children or ()]
    assert not {"link_open", "image", "em_open", "html_inline"} & set(inline)
    assert inline.count("strong_open") == 1  # the guard's message, which the template makes bold


def test_kinds_of_numbers_stand_in_tables_of_their_own() -> None:
    text = card(records(report_of(dense(), pruned(remark="no speed-up: zeros are stored dense"))))
    measured, estimated = text.index("## Measured"), text.index("## Estimated")
    assert text.index("## Counted") < measured < estimated
    assert "| parameters, blocks | 800 | 560 | 70.0 % |" in text
    assert measured < text.index("| Perplexity: wikitext2 | 10.000 ± 0.050 | 12.000 ± 0.050 |") < estimated
    assert measured < text.index("0.90 ×; no speed-up: zeros are stored dense") < estimated
    assert estimated < text.index("at most, batch 1 | reference | 1.40 × |")
    assert "has lost much" in text


def test_what_was_not_measured_is_said() -> None:
    text = card(records())
    (line,) = (line for line in text.splitlines() if line.startswith("Not measured:"))
    assert "Memory" in line and "Generated text" in line and "toxicity" in line
    assert "Speed" not in line and "Perplexity" not in line
    lacking = dense().model_copy(update={"not_measured": {"speed": "no room"}})
    bare = card(records(report_of(lacking, pruned())))
    (line,) = (line for line in bare.splitlines() if line.startswith("Not measured:"))
    assert "speed of dense: no room" in line


def test_a_number_that_was_estimated_is_no_result() -> None:
    guess = number("c4/perplexity", 3.0, how="estimated")
    mine = pruned().model_copy(update={"measurements": (guess,)})
    assert "model-index" not in front(card(records(report_of(dense(), mine))))


LOADING = [
    ("native", "import compresso", "zeros"),
    ("uniform", "on disk", "import compresso"),
    ("padded", "no smaller", "on disk."),
]


@pytest.mark.parametrize(("layout", "says", "silent"), LOADING)
def test_how_to_load_follows_the_layout(layout: str, says: str, silent: str) -> None:
    text = card({**records(report_of(dense(), pruned())), "layout": layout})
    assert says in text and silent not in text
    assert ("custom_code" in front(text)["tags"]) == (layout == "native")
    assert "collaborative prompt, version v1" in text
    assert "## Prompt" not in card({**records(), "prompt": None})


def test_a_cache_that_forgets_is_said_before_anything_else() -> None:
    facts = records()
    assert "No engine serves" not in card(facts)
    facts["stages"]["context_gates"] = {"live_fraction": 0.24}
    lines = card(facts).split("---\n", 2)[2].strip().splitlines()
    assert lines[2].startswith("**No engine serves its pruned context: its cache forgets to 24 % of the context")
