"""What a refused budget proposes can be done: its knobs are the stage's own, and whoever follows it is not refused."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, LlamaConfig, MixtralConfig, ViTConfig

import compresso
from compresso.errors import BudgetError, CompressoError
from compresso.runner.recipe import build, names, read
from compresso.stage import Shrinks, card
from compresso.wording import command_line

BEYOND = 0.02
"""What few recipes reach."""
_SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
_TEXT: dict[str, Any] = {**_SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "vocab_size": 128}
CONFIGS = {
    "llama": LlamaConfig(**_TEXT),
    "mixtral": MixtralConfig(**_TEXT, num_local_experts=4, num_experts_per_tok=2),
    "bert": BertConfig(**_SIZES, intermediate_size=48, vocab_size=128),
    "vit": ViTConfig(**_SIZES, intermediate_size=48, image_size=16, patch_size=8, id2label={0: "a", 1: "b"}),
}
TASKS = {"bert": "masked-lm", "vit": "image-classification"}
SHRINKING = {name: [stage for stage, one in build(read(name)).stages if isinstance(one, Shrinks)] for name in names()}
FIRST = sorted({stages[-1]: name for name, stages in reversed(SHRINKING.items()) if stages}.values())
"""One recipe for each stage that removes something."""
ALL = [name for name, stages in SHRINKING.items() if stages]


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    """The folder of a model's config."""

    def made(name: str) -> Path:
        CONFIGS[name].save_pretrained(tmp_path / name)
        return tmp_path / name

    return made


def options(model: str) -> dict[str, Any]:
    return {"task": TASKS[model]} if model in TASKS else {}


def refusal(recipe: str, model: Path, **given: Any) -> str:
    """What is said in the words of the command line; "" for a plan that nothing speaks against, or not the budget."""
    with command_line():
        try:
            compresso.plan(recipe, model, **given)
        except BudgetError as error:
            return str(error)
        except CompressoError:
            return ""
    return ""


def follow(recipe: str, model: Path, said: str, keep: float, **given: Any) -> int:
    """Do all that a refusal proposes, one after the other; how many there were."""
    followed = 0
    for way in re.split(r", or ", said.rpartition(". ")[2] if ". " in said else said):
        sets = [first or second for first, second in re.findall(r'--set (?:"([^"]+)"|(stages\S+))', way)]
        raised = re.search(r"aise keep to ([\d.]*\d)", way)
        for one in sets:
            _, stage, knob, *_ = re.split(r"[.=]", one)
            assert knob in card(stage).knobs, said
        if sets or raised:
            compresso.plan(recipe, model, keep=float(raised[1]) if raised else keep, sets=sets, **given)
            followed += 1
    return followed


@pytest.mark.parametrize(
    ("recipe", "model"),
    [
        *((name, model) for name in FIRST for model in ("mixtral",)),
        *(pytest.param(name, model, marks=pytest.mark.slow) for name in ALL for model in CONFIGS),
    ],
)
def test_a_cure_names_knobs_of_its_stage_and_helps(recipe: str, model: str, folder: Callable[[str], Path]) -> None:
    where = folder(model)
    said = refusal(recipe, where, keep=BEYOND, **options(model))
    if not said:
        return
    assert "add kinds" not in said and "lower floor" not in said, said
    assert "in 'kinds'" not in said, said
    follow(recipe, where, said, BEYOND, **options(model))


def test_kinds_that_a_mixture_has_are_named_where_heads_are_too_little(folder: Callable[[str], Path]) -> None:
    """The floor of heads is a share of keep: no larger keep helps, and saying so would lead nowhere."""
    where = folder("mixtral")
    said = refusal("gate-taylor", where, keep=0.7)
    assert '--set "stages.gate_taylor.kinds=[head,expert]"' in said and "aise keep" not in said
    assert follow("gate-taylor", where, said, 0.7) == 1
    said = refusal("llm-pruner", where, keep=0.7)  # has no knob of that name
    assert "stages.llm_pruner.kinds" not in said and "take gate_taylor in its place" in said
    assert follow("llm-pruner", where, said, 0.7) == 1


def test_kinds_that_no_unit_is_of_give_way_to_those_that_the_stage_measures(folder: Callable[[str], Path]) -> None:
    where = folder("mixtral")
    said = refusal("contextual", where, keep=0.5)
    assert '--set "stages.contextual.kinds=[head]" and raise keep to' in said
    assert follow("contextual", where, said, 0.5) == 1


def test_a_share_that_the_overrides_give_is_raised_there(folder: Callable[[str], Path]) -> None:
    """As an option beside them it would be said twice."""
    where = folder("mixtral")
    said = refusal("llm-pruner", where, sets=["stages.llm_pruner.keep=0.5"])
    raised = re.search(r"Raise keep to ([\d.]*\d)", said)
    assert raised is not None
    compresso.plan("llm-pruner", where, sets=[f"stages.llm_pruner.keep={raised[1]}"])
