"""`repair` among a selector's knobs is the stage behind it, from the recipe to the checkpoint and after a kill."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compresso.data import nano
from compresso.errors import Interrupted, RecipeError
from compresso.methods import repair as method
from compresso.runner.options import with_options
from compresso.runner.recipe import build, read
from compresso.runner.run import Result, run
from compresso.stage import Effects, cards

SELECTORS = [card.name for card in cards().values() if Effects.SHAPES in card.effects]


@pytest.mark.parametrize("selector", SELECTORS)
def test_the_knob_of_every_selector_is_the_stage_behind_it(selector: str) -> None:
    plain = build({"stages": [selector, "recover"]})
    for value in ("none", None):
        assert build({"stages": [{selector: {"repair": value}}, "recover"]}) == plain
    for value in ("input", "residual"):
        made = build({"stages": [{selector: {"repair": value}}, "recover"]})
        assert made == build({"stages": [selector, {"repair": {"target": value}}, "recover"]})
        assert [name for name, _ in made.stages] == [selector, "repair", "recover"]
        again = build(made.to_dict())
        assert again.stages == made.stages


def test_it_is_set_on_the_command_line_and_its_stage_has_knobs_of_its_own() -> None:
    sets = ["stages.drop_layers.repair=residual", "stages.repair.ridges=[0.3]"]
    made = build(with_options("shortgpt/nano", model=str(nano.path()), sets=sets))
    stages = dict(made.stages)
    assert list(stages) == ["drop_layers", "repair", "recover"]
    assert (stages["repair"].target, stages["repair"].ridges) == ("residual", (0.3,))  # type: ignore[attr-defined]
    assert build(read("shortgpt/nano")).stages[0] == made.stages[0]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"drop_layers": {"repair": "resid"}}], r"repair=resid: wanted none, input or residual.*residual"),
        ([{"drop_layers": {"repair": True}}], r"repair=True: wanted none, input or residual"),
        (["drop_layers", {"recover": {"repair": "input"}}], r"stage 'recover' removes no units"),
        ([{"gate_taylor": {"repair": "input"}}, {"drop_layers": {"repair": "input"}}], r"two repairs; one behind"),
        ([{"drop_layers": {"repair": "input"}}, "repair"], r"two repairs; one behind"),
    ],
)
def test_what_is_no_repair_is_refused(stages: list[Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build({"stages": stages})


def hashed(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def repaired(output: Path, value: str = "residual", resume: bool = False) -> Result:
    stages = [{"drop_layers": {"drop": 2, "batches": 1, "batch": 8, "repair": value}}]
    data = {"source": "world", "limit": 2000, "max_length": 256, "prompt": False, "pack": False, "held": 32}
    raw = {"name": "tried", "data": data, "stages": stages}
    return run(raw, nano.path(), "world", output=output, quiet=True, measure="none", resume=resume)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_reopening")
def test_a_run_repairs_writes_what_it_has_and_goes_on_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, whole = repaired(tmp_path / "plain", "none"), repaired(tmp_path / "whole")
    assert "repair" not in plain.records["stages"]
    facts = whole.records["stages"]["repair"]
    assert facts["applied"]
    assert facts["held_out_loss"][1] < facts["held_out_loss"][0]
    assert whole.records["after"]["held_loss"] < plain.records["after"]["held_loss"]
    assert whole.records["after"]["parameters"] == plain.records["after"]["parameters"]
    opened = AutoModelForCausalLM.from_pretrained(whole.folder, dtype=torch.float32).state_dict()
    for name, facts_of in facts["linears"].items():
        assert facts_of["absorbs"]
        live = whole.model.state_dict()[f"{name}.weight"]
        assert torch.equal(opened[f"{name}.weight"], live.to(torch.bfloat16).float())  # as the files were stored
    real = method.Journal.write

    def dies(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(method.Journal, "write", dies)
    with pytest.raises(Interrupted):
        repaired(tmp_path / "killed")
    monkeypatch.setattr(method.Journal, "write", real)
    assert hashed(repaired(tmp_path / "killed", resume=True).folder) == hashed(whole.folder)
    recipe = whole.records["recipe"]
    assert [list(one) for one in recipe["stages"]] == [["drop_layers"], ["repair"]]
