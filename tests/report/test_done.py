"""Words for what was done come from what stages noted."""

from typing import Any

import pytest

from compresso.report.card import model_card
from compresso.report.done import deeds, participle, removed_kinds
from compresso.report.records import RunRecords
from tests.report.made import checked, records


def with_stages(stages: dict[str, Any], **more: Any) -> RunRecords:
    return checked(records() | {"stages": stages} | more)


@pytest.mark.parametrize(
    ("stages", "word", "told"),
    [
        (
            {"gate_taylor": {"units_kept": {"layers.0.heads": "3/4", "layers.0.channels": "5/8", "hidden": "8/8"}}},
            "pruned",
            ["Heads and FFN channels were removed."],
        ),
        ({"drop_layers": {"units_kept": {"layers": "3/4"}}}, "pruned", ["Layers were removed."]),
        (
            {"wanda": {"sparsity": 0.5}},
            "pruned",
            ["50.0 % of the weights that wanda worked on are zeros."],
        ),
        (
            {"gptq": {"sparsity": None, "bits": 4.25, "group": 64}},
            "quantised",
            ["Weights were rounded by gptq to what takes 4.25 bits each once packed, in groups of 64 inputs."],
        ),
        (
            {"magnitude_structured": {"units_kept": {"layers.1.heads": "0/4"}}, "rtn": {"bits": 8.5, "group": 0}},
            "pruned and quantised",
            ["Heads were removed.", "Weights were rounded by rtn to what takes 8.5 bits each once packed."],
        ),
        ({"recover": {}}, "trained", []),
    ],
)
def test_the_words_fit_what_was_done(stages: dict[str, Any], word: str, told: list[str]) -> None:
    found = with_stages(stages)
    assert (participle(found), deeds(found)) == (word, told)
    card = model_card(found)
    assert f"# tiny, {word}" in card and all(sentence in " ".join(card.split()) for sentence in told)
    assert ("quantised" in card.split("---")[1]) == ("quantised" in word)


def test_what_stayed_whole_is_not_named() -> None:
    kept = {"layers.0.heads": "4/4", "layers.1.queries": "1/2"}
    assert removed_kinds(with_stages({"bonsai": {"units_kept": kept}})) == ["query heads"]
    narrowed = {"layers.0.heads.1.values": "2/4", "layers.0.heads.1.matches": "2/4", "hidden": "8/16"}
    assert removed_kinds(with_stages({"homodistil": {"units_kept": narrowed}})) == [
        "channels of heads",
        "hidden dimensions",
    ]


@pytest.mark.parametrize(("rounded", "lost"), [(("a.q", "a.k"), True), (("a.q",), False)])
def test_a_low_rank_that_a_later_stage_rounded_away_is_not_offered(rounded: tuple[str, ...], lost: bool) -> None:
    svd = {"ranks": {"a.q": 2, "a.k": 2}, "weights": 200, "factored": 120}
    gptq = {"bits": 4.5, "zeros": {f"{name}.weight": "0/100" for name in rounded}}
    first = deeds(with_stages({"svd": svd, "gptq": gptq}, layout="uniform"))[0]
    assert ("writes their factors" in first) == (not lost)
    assert ("their full rank back by gptq" in first) == lost
    assert "writes their factors" in deeds(with_stages({"gptq": gptq, "svd": svd}, layout="uniform"))[1]
    assert "writes no factors" in deeds(with_stages({"svd": svd}, layout="native"))[0]
    assert ("low rank by svd" in with_stages({"svd": svd, "gptq": gptq}).stored_dense()) == (not lost)
