"""Every recipe that ships is complete and means what it says. That each runs is tested in tests/runner/test_run.py."""

import re
from pathlib import Path

import pytest
from transformers import MixtralConfig

from compresso.checkpoint.source import open_source
from compresso.data import nano
from compresso.methods.sparse_finetune import SparseFinetune
from compresso.methods.sparsegpt import SparseGpt
from compresso.runner.dry_run import dry_run
from compresso.runner.recipe import build, names, read, with_knob
from compresso.runner.recipe_file import parse, plain
from compresso.stage import Learns, Shrinks, card
from tests.conftest import FOR_ANY_MODEL, OF_OTHER_MODELS, ONE_SHOT

BASELINES = ("gate-taylor", "llm-pruner", "loraprune", "lorashear", "magnitude-structured", "shortgpt")
DEPTH = {"angular", "perplexity", "reverse", "random", "attention", "mlp"}
every_recipe = pytest.mark.parametrize("name", names())


def test_these_recipes_ship() -> None:
    assert {"compresso", "compresso/nano", "compresso/paper", "compresso/script", *BASELINES} <= set(names())
    assert {f"shortgpt/{name}" for name in DEPTH} <= set(names())
    assert {"contextual", *(f"contextual/{name}" for name in ("faithful", "vocab", "nano"))} <= set(names())


@every_recipe
def test_a_recipe_names_itself_its_title_and_its_paper(name: str) -> None:
    recipe = build(read(name), name)
    assert recipe.name == name
    assert recipe.title
    assert recipe.description
    papers = {card(stage).paper for stage, _ in recipe.stages if stage not in ("recover", "distill")}
    assert recipe.paper in papers
    assert re.fullmatch(r"\d{4}\.\d{5}", recipe.paper) or not any(papers)  # a method may have no paper


@every_recipe
def test_a_recipe_spelled_out_is_the_same_recipe(name: str) -> None:
    spelled = build(read(name), name).to_dict()
    assert build(spelled).to_dict() == spelled


@pytest.mark.parametrize("name", FOR_ANY_MODEL)
def test_a_recipe_fits_the_embedded_model(name: str) -> None:
    built = build(read(name), name)
    shown = dry_run(built, open_source(nano.path(), weights=False))
    kept = shown.after["parameters"]["blocks"] / shown.before["parameters"]["blocks"]
    budgets = [stage.budget() for _, stage in built.stages if isinstance(stage, Shrinks)]
    (keep,) = (budget.keep for budget in budgets if budget is not None)
    of_layers = name.startswith(("shortgpt", "moe/block"))
    coarse = {"pipelines/decoder": 1 / 6}.get(name, 0.06 if of_layers else 0.01)  # of six layers
    assert keep - coarse < kept <= keep + 1e-9


@pytest.mark.parametrize("name", ONE_SHOT)
def test_a_one_shot_recipe_finds_its_linears_and_leaves_every_shape(name: str, tmp_path: Path) -> None:
    folder = nano.path()
    if name in OF_OTHER_MODELS:  # it is for experts alone
        folder = tmp_path
        MixtralConfig(architectures=["MixtralForCausalLM"]).save_pretrained(folder)
    raw = with_knob(
        read(name), "group", 64, required=False
    )  # published groups of 128 do not divide the embedded model's 192
    shown = dry_run(build(raw, name), open_source(folder, weights=False))
    assert shown.after == shown.before


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("size", ["", "/nano"])
def test_baselines_train_for_as_many_updates(baseline: str, size: str) -> None:
    """Equal training is what makes the comparison honest."""

    def lengths(name: str) -> tuple[int, set[int]]:
        learned = [stage.learning() for _, stage in build(read(name)).stages if isinstance(stage, Learns)]
        return sum(one.updates or 0 for one in learned), {one.trains.batch for one in learned}

    assert lengths(baseline + size) == lengths("compresso" + size)


@pytest.mark.parametrize("text", ["2:4", "'2:4'", "30:59.5"])
def test_a_pattern_needs_no_quotes(text: str) -> None:
    """YAML 1.1 counts in sixties: an unquoted 2:4 would be 124."""
    assert plain(text, "value") == text.strip("'")
    assert parse(f"stages: [{{wanda: {{pattern: {text}}}}}]", "mine")["stages"] == [
        {"wanda": {"pattern": text.strip("'")}}
    ]
    assert plain("[1e-3, 1.5, 12, 0x10]", "value") == ["1e-3", 1.5, 12, 16]


@pytest.mark.parametrize("name", sorted(DEPTH))
def test_depth_recipes_differ_in_what_they_drop_alone(name: str) -> None:
    other, plain = build(read(f"shortgpt/{name}")), build(read("shortgpt"))
    assert other.stages[1:] == plain.stages[1:] and other.data == plain.data
    assert other.stages[0] != plain.stages[0]


SPARSE_FINETUNING = {
    "50": ("2 epochs", 3e-5),
    "60": ("2 epochs", 1e-4),
    "70": ("4 epochs", 8e-5),
    "80": ("4 epochs", 1e-4),
    "50-2-4": ("4 epochs", 1e-4),
    "50-16-32": ("4 epochs", 1e-4),
}
"""The authors' epochs and rates, by recipe."""


@pytest.mark.parametrize("name", SPARSE_FINETUNING)
def test_fine_tuning_with_zeros_is_the_published_run(name: str) -> None:
    """Rates and epochs; batch, loss and warm-up; gradients as they are; what SparseGPT leaves."""
    stages = dict(build(read(f"sparse-finetune/{name}"), name).stages)
    sparsegpt, stage = stages["sparsegpt"], stages["sparse_finetune"]
    assert isinstance(sparsegpt, SparseGpt) and isinstance(stage, SparseFinetune)
    assert (stage.trains.steps, stage.adamw.lr) == SPARSE_FINETUNING[name]
    assert (stage.trains.batch, stage.adamw.warmup, stage.adamw.lr_schedule) == (32, 20, "linear")
    assert (stage.hard_weight, stage.kl_weight, stage.feature_weight, stage.weight_decay) == (1, 0, 1, 0)
    assert stage.adamw.clip is None and stage.norm == "global" and stage.masks == "all"
    share, _, pattern = name.partition("-")
    assert sparsegpt.pattern == pattern.replace("-", ":") if pattern else sparsegpt.sparsity == int(share) / 100
