"""A recipe of next tokens names, for a model of another kind, recipes that take it: each is planned as it is named."""

import re
import shlex
from pathlib import Path

import pytest
from transformers import BertConfig, MixtralConfig, MobileViTConfig, PreTrainedConfig, SegformerConfig, ViTConfig

from compresso.commands.plan import plan
from compresso.errors import ArchError, BudgetError, CompressoError

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(vocab_size=64, architectures=["BertForMaskedLM"], **TINY),
    "bare bert": BertConfig(vocab_size=64, **TINY),
    "vit": ViTConfig(image_size=32, patch_size=8, architectures=["ViTForImageClassification"], **TINY),
    "mobilevit": MobileViTConfig(architectures=["MobileViTForSemanticSegmentation"]),
    "segformer": SegformerConfig(image_size=[64, 64], architectures=["SegformerForSemanticSegmentation"]),
}


def folder_of(config: PreTrainedConfig, tmp_path: Path) -> Path:
    config.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("recipe", ["wanda/50", "moe/expert-drop", "slicegpt/20"])
@pytest.mark.parametrize("name", CONFIGS)
def test_each_recipe_that_is_named_in_its_place_takes_the_model(name: str, recipe: str, tmp_path: Path) -> None:
    model = folder_of(CONFIGS[name], tmp_path)
    with pytest.raises(ArchError, match="works on next tokens; give another recipe: ") as refused:
        plan(recipe, str(model))
    cure = str(refused.value).partition("give another recipe: ")[2]
    named = re.split(r", | or ", cure)
    assert named
    for one in named:
        other, *options = shlex.split(one.replace("--task ", "--task=").replace("task=", "task="))
        task = options[0].partition("=")[2] if options else None
        assert plan(other, str(model), task=task), one


def test_a_recipe_that_takes_any_task_names_the_task_as_before(tmp_path: Path) -> None:
    with pytest.raises(ArchError, match="it sees pictures; give task='image-classification'"):
        plan("gate-taylor", str(folder_of(CONFIGS["vit"], tmp_path)))


@pytest.mark.parametrize("task", [None, "classification", "question-answering"])
def test_a_decoder_with_another_head_is_no_encoder(task: str | None, tmp_path: Path) -> None:
    """No task's cure leads to the next refusal: none takes it."""
    config = MixtralConfig(
        vocab_size=64,
        num_key_value_heads=2,
        num_local_experts=4,
        architectures=["MixtralForSequenceClassification"],
        **TINY,
    )
    with pytest.raises(ArchError, match="is a decoder") as refused:
        plan("gate-taylor", str(folder_of(config, tmp_path)), task=task)
    said = str(refused.value)
    assert "MixtralForSequenceClassification" in said and "encoder of texts" not in said and "give task" not in said


@pytest.mark.parametrize(
    ("recipe", "cure"),
    [
        ("moe/expert-drop", {"keep": 0.5}),
        ("compresso", {"bytes_at_context": 64, "keep": 0.9}),
        ("wanda/50", {}),
    ],
)
def test_a_budget_of_memory_that_texts_have_not_names_what_the_recipe_takes(
    recipe: str, cure: dict[str, float], tmp_path: Path
) -> None:
    config = MixtralConfig(
        vocab_size=64, num_key_value_heads=2, num_local_experts=4, architectures=["MixtralForCausalLM"], **TINY
    )
    model = str(folder_of(config, tmp_path))
    with pytest.raises(BudgetError, match="memory='5GB' is a budget of models of pictures") as refused:
        plan(recipe, model, memory="5GB")
    said = str(refused.value).rpartition(";")[2]
    assert {name for name in ("bytes_at_context", "keep") if f"{name}=" in said} == set(cure)
    try:
        assert plan(recipe, model, **cure)  # type: ignore[arg-type]
    except CompressoError as error:
        assert "has a budget of that" not in str(error) and "takes a share" not in str(error), error
