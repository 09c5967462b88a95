"""What a training would stop at is refused before anything is trained, and before weights and data are read."""

from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig

from compresso.checkpoint.source import open_source
from compresso.errors import RecipeError
from compresso.runner.dry_run import dry_run
from compresso.runner.recipe import build
from compresso.runner.run import run

ENCODER = BertConfig(
    vocab_size=32, hidden_size=16, num_hidden_layers=6, num_attention_heads=2, intermediate_size=24, num_labels=2
)


def acted(folder: Path, *stages: dict[str, Any], task: str = "classification", **data: Any) -> None:
    """Act stages out on a config alone."""
    dry_run(
        build({"name": "tried", "task": task, "data": data, "stages": list(stages)}),
        open_source(str(folder), weights=False),
    )


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    ENCODER.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.mark.parametrize(
    ("stages", "layers", "left"),
    [
        ([], (0, 1, 2, 3, 4, 5, 5), 6),
        ([], (9, 9, 9, 9, 9, 9), 6),
        ([{"keep_layers": {"every": 2}}], (0, 1, 2, 3, 4, 5), 3),
        ([{"finetune": {}}, {"keep_layers": {"layers": [1, 4]}}], (1, 6), 2),
    ],
)
def test_teacher_layers_are_those_of_the_dense_model_one_for_each_that_is_left(
    encoder: Path, stages: list[dict[str, Any]], layers: tuple[int, ...], left: int
) -> None:
    wanted = rf"teacher_layers: layers \[.*\]: wanted {left} of the teacher's 0 to 5"
    with pytest.raises(RecipeError, match=wanted):
        acted(encoder, *stages, {"qat": {"teacher_layers": list(layers)}})
    acted(encoder, *stages, {"qat": {"teacher_layers": [5] * left}})


def test_single_query_heads_that_have_left_are_said_before(tiny_folder: Path) -> None:
    bonsai = {"bonsai": {"keep": 0.8, "kinds": ["query", "channel"]}}
    for taught, message in (
        ({"qat": {}}, "single query heads have left"),
        ({"homodistil": {"keep": 0.9, "of": "blocks"}}, "lost query heads before"),
    ):
        with pytest.raises(RecipeError, match=message):
            acted(tiny_folder, bonsai, taught, task="causal-lm")
    acted(tiny_folder, bonsai, {"qat": {"attention_weight": 0}}, task="causal-lm")


@pytest.mark.parametrize("stage", ["distill", "token_distill", "sparse_finetune", "homodistil", "qat"])
def test_a_dense_model_of_other_tokens_teaches_nothing(tiny_folder: Path, stage: str) -> None:
    knobs = {"keep": 0.9, "of": "blocks"} if stage == "homodistil" else {}
    with pytest.raises(RecipeError, match=f"Put 'cut_vocab' behind '{stage}'"):
        acted(tiny_folder, {"cut_vocab": {}}, {stage: knobs}, task="causal-lm")


def test_nothing_held_out_is_nothing_to_evaluate_on(encoder: Path) -> None:
    with pytest.raises(RecipeError, match=r"stage 'token_distill': evaluations=3 .* data.held=0 .*evaluations: 0"):
        acted(encoder, {"token_distill": {"evaluations": 3}}, held=0)
    acted(encoder, {"token_distill": {"evaluations": 0}}, held=0)
    acted(encoder, {"token_distill": {"evaluations": 3}}, held=1)


def test_too_few_updates_to_shrink_in_are_seen_before_the_probes(tiny_folder: Path) -> None:
    with pytest.raises(RecipeError, match="1 update is left to shrink in, at least 2 are needed"):
        acted(tiny_folder, {"lorashear": {"keep": 0.8, "tune": 1, "shrink": 400, "max_steps": 2}}, task="causal-lm")
    acted(tiny_folder, {"lorashear": {"keep": 0.8, "tune": "1 epoch", "shrink": 400}}, task="causal-lm")


def test_a_run_refuses_them_before_it_trains(tiny_folder: Path, instructions: Path, tmp_path: Path) -> None:
    raw = {"stages": [{"recover": {"steps": 1}}, {"qat": {"teacher_layers": [7, 7, 7]}}]}
    with pytest.raises(RecipeError, match="teacher_layers"):
        run(raw, model=str(tiny_folder), data=str(instructions), output=tmp_path / "never")
    assert not [*tmp_path.glob("*never*")]
