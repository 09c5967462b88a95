"""Several stages in one run: prune, distil, quantise. What each left is told, rounding stands last, and a run that is
killed in any of them ends in the same bytes.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import SHORT, Call, Forked, Ran, work_of

from compresso.checkpoint.source import open_source
from compresso.data import nano
from compresso.errors import RecipeError
from compresso.report.records import RunRecords
from compresso.report.stage_table import stage_table
from compresso.runner.dry_run import dry_run
from compresso.runner.inspection import inspect
from compresso.runner.recipe import build

DISTIL = ("stages.distill.steps=6", "stages.distill.batch=4", "stages.distill.rank=2", "stages.distill.save_every=2")
DECODER = [
    *SHORT,
    *DISTIL,
    *("stages.drop_layers.keep=0.7", "stages.drop_layers.batches=2", "stages.drop_layers.batch=4"),
    "stages.gptq.calibration={examples: 8, batch: 4}",
]


def acted(*stages: dict[str, Any] | str) -> None:
    dry_run(build({"name": "mine", "stages": list(stages)}), open_source(nano.path(), weights=False))


RTN, PRUNE = {"rtn": {"bits": 4}}, {"gate_taylor": {"keep": 0.7}}


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (RTN, PRUNE),
        (RTN, {"drop_layers": {"drop": 1}}),
        ({"gptq": {"bits": 4}}, "recover"),
        ("awq", "distill"),
        ("sparsegpt", None),
        ({"sparsegpt": {"bits": 4}}, {"sparse_finetune": {}}),
        ({"besa": {"bits": 4}}, "recover"),
        ({"besa": {"bits": 4}}, {"svd": {}}),
        (RTN, {"wanda": {}}),
        (RTN, {"qat": {"weight_bits": 16, "input_bits": 8}}),
    ],
)
def test_what_would_undo_a_rounding_is_refused_with_the_order_that_works(first: Any, then: Any) -> None:
    if then is None:  # without bits it rounds nothing
        acted(first, "recover")
        return
    names = [one if isinstance(one, str) else next(iter(one)) for one in (first, then)]
    wanted = f"stage '{names[1]}' changes weights or shapes behind '{names[0]}', .*; put '{names[1]}' before"
    with pytest.raises(RecipeError, match=wanted) as refused:
        acted(first, then)
    assert len(str(refused.value).splitlines()) == 1
    acted(then, first)


def test_roundings_may_follow_each_other_and_patches_that_change_no_weight() -> None:
    acted(RTN, {"gptq": {"bits": 4, "where": {"ignore": ["*.down_proj"]}}})
    acted(PRUNE, RTN, {"skip_in_prefill": {"skip": 0.3}})
    acted({"qat": {"weight_bits": 16, "steps": 0}}, RTN)


def test_shapes_behind_rounded_activations_are_refused_too(call: Call, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    for last, said in (("gate_taylor", "after 'smoothquant' patched"), ("recover", "behind 'smoothquant', whose")):
        recipe.write_text(f"stages: [smoothquant, {last}]\n")
        code, out, error = call("run", recipe, "--model", nano.path(), "--data", "world", "--output", tmp_path / "out")
        assert (code, out) == (2, "") and said in error and len(error.splitlines()) == 1
        assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_records_tell_what_each_stage_left(ran: Ran, tiny_folder: Path) -> None:
    result = ran("pipelines/nano", sets=("data.source=null",))
    records = RunRecords.checked(result.records, "the records")
    assert [*records.stages] == ["gate_taylor", "repair", "distill", "gptq"]
    lefts = [facts.left for facts in records.stages.values()]
    assert all(one is not None and one.score is not None for one in lefts)
    first, *_, last = (one for one in lefts if one is not None)
    assert inspect(str(tiny_folder))["parameters"]["total"] > first.parameters == last.parameters
    assert last.parameters == records.after.parameters["total"] and last.held_loss == records.after.held_loss
    told = records.report.models[1].value("held/perplexity")
    assert last.score is not None and told == last.score.value
    assert records.data is not None and len(set(records.data.notes)) == len(records.data.notes) > 1  # each said once
    table = stage_table(records)
    assert table is not None and [row[0] for row in table.rows] == ["dense", *records.stages]
    assert "| gptq |" in (result.folder / "README.md").read_text()


def outcome(output: Path) -> tuple[str, dict[str, Any]]:
    stages = json.loads((output / "records.json").read_text())["stages"]
    facts = {name: {key: value for key, value in stage.items() if key != "seconds"} for name, stage in stages.items()}
    return hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest(), facts


@pytest.mark.slow
def test_killed_in_every_stage_a_pipeline_ends_in_the_same_bytes(
    forked: Forked, tiny_folder: Path, instructions: Path, tmp_path: Path
) -> None:
    def arguments(output: Path, *more: str) -> list[str]:
        given = ["--model", str(tiny_folder), "--data", str(instructions), "--output", str(output)]
        sets = [part for one in DECODER for part in ("--set", one)]
        return ["run", "pipelines/decoder", *given, *sets, "--measure", "none", "--allow-collapsed", *more]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, log = forked(arguments(whole))
    assert code == 0, log
    table = log[log.index("stage  ") :].splitlines()
    assert [line.split()[0] for line in table[1:6]] == ["dense", "drop_layers", "repair", "distill", "gptq"]
    resume: list[str] = []
    stages = work_of(killed) / "stages"
    for phase, at, done in (
        *(("scores", 1, 0), ("saved", 1, 1), ("repair", 1, 1), ("saved", 2, 2), ("distill", 3, 2)),
        *(("gptq", 1, 3), ("saved", 4, 4)),
    ):
        code, log = forked(arguments(killed, *resume), event="kill", phase=phase, at=at)
        assert code == -9, log
        assert len(list(stages.glob("0*"))) == done, phase
        resume = ["--resume"]
    code, log = forked(arguments(killed, *resume))
    assert code == 0, log
    assert outcome(killed) == outcome(whole)
