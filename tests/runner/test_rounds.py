"""`rounds` among a selector's knobs: what a run of several rounds does is told beforehand, adds up, ends where a single
cut would, and goes on after a kill in any round. Laws, and counts by hand.
"""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import SHORT, Call, Forked, work_of
from tests.runner.test_matrix import LORA, VARIANTS
from tests.runner.test_pipelines import outcome

import compresso
from compresso.arch.base import arch_for
from compresso.arch.costs import shape_facts
from compresso.checkpoint.load import meta_model
from compresso.checkpoint.source import open_source
from compresso.commands.run import show
from compresso.core.latency_table import Conditions, LatencyTable
from compresso.core.plan import Plan
from compresso.data import nano
from compresso.errors import BudgetError, CollapseError, CompressoError, RecipeError
from compresso.job import Job
from compresso.report.records import RunRecords
from compresso.report.stage_table import stage_table
from compresso.runner import execution
from compresso.runner.data_facts import data_facts
from compresso.runner.dry_run import dry_run
from compresso.runner.measured_budget import machine_here
from compresso.runner.options import with_options
from compresso.runner.plan import plan
from compresso.runner.recipe import build
from compresso.runner.round_knobs import Steps
from compresso.runner.rounds import Act, Begun, told
from compresso.runner.run import Result, run
from compresso.solve.gradual import geometric_share
from compresso.stage import Effects, cards
from compresso.training.duration import part

SELECTORS = [one for one in cards().values() if Effects.SHAPES in one.effects]
ONCE = ["cut_vocab", "drop_experts", "filter_pruning", "homodistil", "keep_layers", "loraprune", "lorashear"]
REPEATED = [one.name for one in SELECTORS if one.name not in ONCE]
LOOKS = {"batches": 1, "batch": 4, "micro_batch": 4}
DATA = {"max_length": 128, "prompt": False, "pack": False, "held": 4, "limit": 40}


def raw(*stages: Any, **data: Any) -> dict[str, Any]:
    return {"name": "tried", "data": DATA | data, "stages": list(stages)}


def gate_taylor(**knobs: Any) -> dict[str, Any]:
    return {"gate_taylor": {**LOOKS, **knobs}}


def recover(steps: int | str, **knobs: Any) -> dict[str, Any]:
    return {"recover": {**LORA, "steps": steps, **knobs}}


def ran(output: Path, model: Path, data: Path, *stages: Any, **options: Any) -> Result:
    how = {"quiet": True, "measure": "none", "allow_collapsed": True}
    return run(raw(*stages), model, data, output=output, **how, **options)


def test_shares_fall_by_equal_factors_and_end_on_the_budget() -> None:
    for final in (0.9, 0.5, 0.13):
        for n in (1, 2, 3, 7):
            shares = [geometric_share(final, done, n) for done in range(n + 1)]
            assert shares[0] == 1 and shares[-1] == final
            factors = [after / before for before, after in itertools.pairwise(shares)]
            assert factors == pytest.approx([final ** (1 / n)] * n)


def test_parts_of_a_training_add_up_and_differ_by_one_at_most() -> None:
    for total in range(20):
        for turns in range(1, 8):
            parts = [part(total, turn, turns) for turn in range(1, turns + 1)]
            assert sum(parts) == total and max(parts) - min(parts) <= 1


def test_a_round_is_the_selector_and_what_makes_up_for_it() -> None:
    made = build(raw(gate_taylor(rounds=2, repair="residual"), recover(4), "distill", "gptq", "sparse_finetune"))
    turns = [act.label for act in made.acts]
    once = ["gate_taylor", "repair", "recover", "distill"]
    assert turns == [f"{name} {turn}/2" for turn in (1, 2) for name in once] + ["gptq", "sparse_finetune"]
    assert len({act.folder for act in made.acts}) == len(turns)
    alone = build(raw("cut_vocab", gate_taylor(rounds=3), "magnitude"))
    assert [act.label for act in alone.acts] == ["cut_vocab", *(f"gate_taylor {n}/3" for n in (1, 2, 3)), "magnitude"]


@pytest.mark.parametrize("name", REPEATED)
def test_one_round_is_the_stage_alone_and_several_are_written_as_they_were_given(name: str) -> None:
    plain = build(raw(name, recover(8)))
    assert build(raw({name: {"rounds": 1}}, recover(8))) == plain
    assert build(raw({name: {"rounds": 1}}, recover(8))).to_dict() == plain.to_dict()
    assert build(raw({name: {"rounds": 3.0}}, recover(8))) == build(raw({name: {"rounds": 3}}, recover(8)))
    assert all(act.stage is stage for act, (_, stage) in zip(plain.acts, plain.stages, strict=True))
    made = build(raw({name: {"rounds": 3}}, recover(8)))
    assert made != plain and made.stages == plain.stages
    assert build(made.to_dict()) == made


def test_it_is_set_on_the_command_line() -> None:
    made = build(
        with_options("gate-taylor/nano", model=str(nano.path()), keep=0.5, sets=["stages.gate_taylor.rounds=4"])
    )
    assert [len(one.shares) for one in made.rounds.values()] == [4] and len(made.acts) == 8
    assert told(made.acts) == [
        "gate_taylor: 4 rounds, by equal factors: 0.8409, 0.7071, 0.5946, 0.5 of blocks stay",
        "recover: 75, 75, 75, 75 of its 300 updates, round by round",
    ]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([gate_taylor(rounds=0), "recover"], r"stage 'gate_taylor': rounds=0: wanted a whole number of at least 1"),
        ([gate_taylor(rounds=-2)], r"rounds=-2: wanted"),
        ([gate_taylor(rounds=2.5)], r"rounds=2\.5: wanted"),
        ([gate_taylor(rounds=True)], r"rounds=True: wanted"),
        ([gate_taylor(rounds="four")], r"rounds='four': wanted"),
        (["gate_taylor", {"recover": {"rounds": 2}}], r"stage 'recover' removes no units.* give rounds to the stage"),
        ([{"wanda": {"rounds": 2}}], r"stage 'wanda' removes no units"),
        ([gate_taylor(rounds=4), recover(3)], r"'recover': 3 updates are fewer than the 4 .*rounds=4 of gate_taylor"),
        ([gate_taylor(rounds=4), recover(30, max_steps=2)], r"stage 'recover': 2 updates are fewer than the 4"),
        ([{"learn_gates": {"tune": 1, "ramp": 2, "hold": 2, "rounds": 2}}], r"5 updates are fewer than the 6"),
        ([{"drop_layers": {"drop": 2, "rounds": 2}}], r"a share that stays, and it has none below 1; give keep"),
        ([{"llm_pruner": {"ratio": 0.3, "rounds": 2}}], r"a share that stays, and it has none below 1; give keep"),
        ([gate_taylor(keep=1.0, rounds=2)], r"a share that stays, and it has none below 1; give keep"),
        *(([{name: {"rounds": 2}}], rf"stage '{name}': rounds=2: it is not repeated, since \w") for name in ONCE),
    ],
)  # fmt: skip
def test_what_cannot_be_done_in_rounds_is_refused(stages: list[Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as refused:
        build(raw(*stages))
    assert len(str(refused.value).splitlines()) == 1


def test_epochs_too_short_for_the_rounds_are_refused_once_the_data_is_read(
    call: Call, tiny_folder: Path, instructions: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(json.dumps(raw(gate_taylor(rounds=8, keep=0.5), recover("0.5 epochs"))))
    given = ("--model", tiny_folder, "--data", instructions, "--output", tmp_path / "out")
    code, out, error = call("run", recipe, *given)
    assert (code, out) == (2, "") and "5 updates are fewer than the 8 that rounds=8 of gate_taylor take" in error


def test_a_floor_out_of_reach_is_told_of_all_rounds(tiny_folder: Path) -> None:
    made = build(raw(gate_taylor(rounds=3, keep=0.1, kinds=["head"])))
    with pytest.raises(BudgetError, match=r"keep=0\.1 allows"):
        dry_run(made, open_source(tiny_folder, weights=False))


def test_a_budget_that_a_stage_alone_finds_out_of_reach_ends_in_a_line(
    call: Call, tiny_folder: Path, instructions: Path, tmp_path: Path
) -> None:
    knobs = {"keep": 0.001, "search": "dp", "batches": 2, "judged": "found", "texts": 0, "examples": 8, "judge_rows": 2}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(raw({"ristretto": knobs})))
    code, _, error = call("run", recipe, "--model", tiny_folder, "--data", instructions, "--output", tmp_path / "out")
    assert code == 2 and "Traceback" not in error
    line = error.splitlines()[-1]
    assert line.startswith("BudgetError: stage 'ristretto': within the budget no attention and no FFN is left"), line
    assert "raise --keep" in line or "raise keep" in line


def test_a_floor_that_is_a_share_is_one_of_what_the_first_round_received(tiny_folder: Path) -> None:
    """Of three units, .84 are three: rounded round by round, none would ever leave."""
    stage = dict(build(raw(gate_taylor(keep=0.5, floor={"head": "keep", "channel": 2}))).stages)["gate_taylor"]

    class Costs:
        def __call__(self) -> "Costs":
            return self

        def count(self, of: str) -> float:
            assert of == "blocks"
            return 80.0

    steps = Steps(tuple(0.5 ** (turn / 4) for turn in (1, 2, 3, 4)))
    turns = [Act("gate_taylor", stage, turn, steps) for turn in (1, 2, 3, 4)]
    taken = [act.taken(Begun(100.0, {"head": 3}), Costs(), None) for act in turns]  # type: ignore[arg-type]
    floors = [one.budget().floor for one in taken]  # type: ignore[attr-defined]
    assert [one["head"] for one in floors] == [3, 2, 2, 2] and all(one["channel"] == 2 for one in floors)
    shares = [0.5 ** (turn / 4) * 100 / 80 for turn in (1, 2, 3, 4)]
    assert [one.budget().keep for one in taken] == pytest.approx([min(1.0, one) for one in shares])  # type: ignore[attr-defined]


def test_a_plan_counts_all_rounds(tiny_folder: Path, instructions: Path) -> None:
    stages = [gate_taylor(keep=0.5, rounds=3, floor={"head": "keep"}), recover(8)]
    facts = plan(raw(*stages), str(tiny_folder))
    single = plan(raw({"gate_taylor": {**stages[0]["gate_taylor"], "rounds": 1}}, stages[1]), str(tiny_folder))
    blocks = [one["parameters"]["blocks"] for one in (facts["before"], facts["after"])]
    assert blocks[1] <= 0.5 * blocks[0] and single["after"]["parameters"]["blocks"] <= 0.5 * blocks[0]
    assert [one["updates"] for one in facts["training"]] == [2, 3, 3]
    assert sum(one["tokens_at_most"] for one in facts["training"]) == single["training"][0]["tokens_at_most"]
    assert facts["training"][0]["flops_at_most"] / 2 > facts["training"][2]["flops_at_most"] / 3, "models get smaller"
    assert [one["stage"] for one in facts["stages"]] == [
        f"{n} {r}/3" for r in (1, 2, 3) for n in ("gate_taylor", "recover")
    ]
    made = build(raw(stages[0], recover("2 epochs")))
    source = open_source(tiny_folder)
    told_of = data_facts(made, raw(*stages), str(instructions), source, dry_run(made, source).stages, skip_bad=False)
    assert [one["updates"] for one in told_of["epochs"]] == [6, 6, 6]  # 36 rows of 4: 9 an epoch


@pytest.mark.usefixtures("quick_reopening")
def test_kept_units_are_nested_steps_add_up_and_the_last_round_is_on_the_budget(
    tiny_folder: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Plan, int, set[tuple[int, ...]]]] = []
    save = execution.save_stage

    def watched(job: Job, *more: Any, **options: Any) -> None:
        ids = {tuple(job.batches(4, "recover").at(0, range(4))["input_ids"].flatten().tolist())}
        seen.append((job.plan, int(job.cost()().parameters()["blocks"]), ids))
        save(job, *more, **options)

    monkeypatch.setattr(execution, "save_stage", watched)
    selector = gate_taylor(keep=0.5, rounds=3, repair="input", floor={"head": "keep"})
    result = ran(tmp_path / "out", tiny_folder, instructions, selector, recover(8))
    stages = result.records["stages"]
    assert [*stages] == [f"{name} {turn}/3" for turn in (1, 2, 3) for name in ("gate_taylor", "repair", "recover")]
    assert sum(stages[f"recover {turn}/3"]["updates"] for turn in (1, 2, 3)) == 8
    whole = result.records["before"]["parameters"]["blocks"]
    limits = [geometric_share(0.5, turn, 3) * whole for turn in (1, 2, 3)]
    smallest_unit = 3 * 32  # a channel's row of gate and up, and its column of down
    for turn, limit in enumerate(limits):
        assert limit - smallest_unit < seen[3 * turn][1] <= limit, "on its budget, and nothing more fits"
    assert result.records["after"]["parameters"]["blocks"] == seen[-1][1]
    for (before, *_), (after, *_) in itertools.pairwise(seen):
        for name, kept in before.kept.items():
            assert set(after.kept[name]) <= set(kept), name
    assert result.plan == seen[-1][0]
    learned = [stages[f"recover {turn}/3"]["curve"]["loss"][0] for turn in (1, 2, 3)]
    assert len(set(learned)) == 3
    table = stage_table(RunRecords.checked(result.records, "the records"))
    assert table is not None and [row[0] for row in table.rows] == ["dense", *stages]
    page, card = (result.folder / "report.html").read_text(), (result.folder / "README.md").read_text()
    assert all(f"| {name} |" in card and name in page for name in stages)
    assert "in 3 rounds" in page
    (first, *_) = result.records["recipe"]["stages"]
    assert first["gate_taylor"]["rounds"] == 3


@pytest.mark.usefixtures("quick_reopening")
def test_every_round_has_an_order_of_examples_of_its_own(
    tiny_folder: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    entered = execution.entered

    def watched(job: Job, act: Act) -> Any:
        given = entered(job, act)
        seen.append(given[0].seed)
        return given

    monkeypatch.setattr(execution, "entered", watched)
    ran(
        tmp_path / "out",
        tiny_folder,
        instructions,
        gate_taylor(keep=0.6, rounds=3),
        recover(3, save_adapter=True),
        seed=7,
    )
    assert seen[0] == seen[1] == 7 and seen[2] == seen[3] and seen[4] == seen[5] and len(set(seen)) == 3
    assert sorted(one.name for one in (tmp_path / "out" / "adapters").iterdir()) == [
        "recover-1",
        "recover-2",
        "recover-3",
    ]


@pytest.mark.usefixtures("quick_reopening")
def test_one_round_ends_in_the_same_bytes(tiny_folder: Path, instructions: Path, tmp_path: Path) -> None:
    plain = ran(tmp_path / "plain", tiny_folder, instructions, gate_taylor(keep=0.6), recover(2))
    once = ran(tmp_path / "once", tiny_folder, instructions, gate_taylor(keep=0.6, rounds=1), recover(2))
    assert outcome(plain.folder) == outcome(once.folder)
    assert [*once.records["stages"]] == ["gate_taylor", "recover"]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_reopening")
@pytest.mark.parametrize("name", REPEATED)
def test_every_selector_that_is_repeated_ends_on_its_budget(
    name: str, tiny_folder: Path, instructions: Path, tmp_path: Path
) -> None:
    (knobs,) = VARIANTS[name][0].values()
    keep = {"contextual": 0.7, "drop_layers": 0.6}.get(name, 0.4)  # channels alone; three layers
    knobs = {key: value for key, value in knobs.items() if key != "drop"} | {"keep": keep, "rounds": 2}
    knobs |= {"hold": 2, "ramp": 2} if name == "learn_gates" else {}
    result = ran(tmp_path / "out", tiny_folder, instructions, {name: knobs}, recover(2))
    before, after = (result.records[when]["parameters"]["blocks"] for when in ("before", "after"))
    assert after <= keep * before * 1.02
    first, last = (result.records["stages"][f"{name} {turn}/2"]["parameters_after"]["blocks"] for turn in (1, 2))
    assert first > 1.1 * keep * before, "the first round leaves something to the second"
    assert last == after
    assert all(torch.isfinite(one).all() for one in result.model.parameters())
    if name == "learn_gates":
        updates = [result.records["stages"][f"{name} {turn}/2"]["updates"] for turn in (1, 2)]
        assert [sum(one.values()) for one in updates] == [2, 2]


@pytest.mark.slow
def test_killed_in_every_round_it_ends_in_the_same_bytes(
    forked: Forked, tiny_folder: Path, instructions: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.yaml"
    selector = gate_taylor(keep=0.5, rounds=3, repair="residual")
    recipe.write_text(json.dumps(raw(selector, recover(9, save_every=1))))

    def arguments(output: Path, *more: str) -> list[str]:
        given = ["--model", str(tiny_folder), "--data", str(instructions), "--output", str(output)]
        sets = [part for one in SHORT for part in ("--set", one)]
        return ["run", str(recipe), *given, *sets, "--measure", "none", "--allow-collapsed", *more]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, log = forked(arguments(whole))
    assert code == 0, log
    resume: list[str] = []
    stages = work_of(killed) / "stages"
    for phase, at, done in (
        *(("scores", 1, 0), ("recover", 2, 2), ("saved", 3, 3)),
        *(("scores", 1, 3), ("repair", 1, 4), ("recover", 1, 5)),
        *(("recover", 2, 5), ("repair", 1, 7), ("saved", 9, 9)),
    ):
        code, log = forked(arguments(killed, *resume), event="kill", phase=phase, at=at)
        assert code == -9, log
        assert len(list(stages.glob("0*"))) == done, (phase, sorted(one.name for one in stages.glob("*")))
        resume = ["--resume"]
    code, log = forked(arguments(killed, *resume))
    assert code == 0, log
    assert outcome(killed) == outcome(whole)


def test_an_act_of_a_single_round_is_the_stage_itself() -> None:
    (act,) = build(raw(gate_taylor())).acts
    assert act == Act("gate_taylor", act.stage) and act.label == act.folder == "gate_taylor" and not act.cuts
    assert act.taken(None, None, 10) is act.stage
    assert replace(act, steps=Steps((0.7, 0.5))).label == "gate_taylor 1/2"


TARGETS = {"wide": 0.75, "narrow": 0.5}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (0.5, r"family=0\.5: wanted falling shares that stay.*for one result give keep"),
        ([0.5], r"wanted falling shares"),
        ([0.5, 0.8], r"family: 0\.8=0\.8: wanted falling shares that stay, .*, each below the one before"),
        ([0.5, 0.5], r"wanted falling shares"),
        ([1.0, 0.5], r"family: 1=1\.0: wanted"),
        ({"a": 0.5, "b": "half"}, r"family: b='half': wanted"),
        ({"a/b": 0.8, "c": 0.5}, r"'a/b' is to name a folder"),
        ({"..": 0.8, "c": 0.5}, r"'\.\.' is to name a folder"),
    ],
)
def test_what_is_no_family_is_refused(targets: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as refused:
        build(raw(gate_taylor(family=targets)))
    assert len(str(refused.value).splitlines()) == 1


def test_a_family_is_read_told_and_written_as_it_was_given(tiny_folder: Path) -> None:
    made = build(raw(gate_taylor(family=[0.8, 0.5]), recover(4)))
    assert [act.label for act in made.acts] == [f"{n} {t}" for t in ("0.8", "0.5") for n in ("gate_taylor", "recover")]
    assert [act.target for act in made.acts] == ["", "0.8", "", "0.5"]
    assert build(made.to_dict()) == made
    assert told(made.acts) == [
        "gate_taylor: 2 targets (0.8, 0.5): 0.8, 0.5 of blocks stay",
        "recover: all of its updates for each of 2 targets",
    ]
    assert [one["updates"] for one in plan(made.to_dict(), str(tiny_folder))["training"]] == [4, 4]
    with pytest.raises(RecipeError, match="rounds and family both say"):
        build(raw(gate_taylor(family=[0.8, 0.5], rounds=2)))
    with pytest.raises(RecipeError, match="'gptq' stands behind 'gate_taylor', whose targets are written before it"):
        build(raw(gate_taylor(family=[0.8, 0.5]), recover(4), "gptq"))
    with pytest.raises(BudgetError, match=r"--keep 0\.4 is one budget, and stage 'gate_taylor' has several targets"):
        with_options(made.to_dict(), model=str(tiny_folder), keep=0.4)


@pytest.mark.usefixtures("quick_reopening")
def test_each_target_is_a_checkpoint_on_its_budget_within_the_one_before(
    tiny_folder: Path, instructions: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    stages = [gate_taylor(family=TARGETS), recover(2)]
    result = ran(output, tiny_folder, instructions, *stages)
    assert sorted(one.name for one in output.iterdir()) == sorted(TARGETS)
    assert not work_of(output).exists()
    assert result.folder == output / "narrow" and [*result.family] == [*TARGETS]
    plans: list[Plan] = []
    for turn, (name, share) in enumerate(TARGETS.items()):
        folder = result.family[name]
        records = RunRecords.checked(json.loads((folder / "records.json").read_text()), name)
        assert 0.97 * share < records.after.parameters["blocks"] / records.before.parameters["blocks"] <= share
        opened = compresso.load(folder).model
        assert sum(one.numel() for one in opened.parameters()) == records.after.parameters["total"]
        assert [*records.stages] == [f"{n} {t}" for t in [*TARGETS][: turn + 1] for n in ("gate_taylor", "recover")]
        assert all((records.stages[f"recover {t}"].model_extra or {})["updates"] == 2 for t in [*TARGETS][: turn + 1])
        plans.append(Plan.from_json((folder / "plan.json").read_text()))
    assert all(set(plans[1].kept[name]) <= set(kept) for name, kept in plans[0].kept.items())
    again = ran(output, tiny_folder, instructions, *stages, overwrite=True)
    assert again.records["after"] == result.records["after"]
    (output / "mine.txt").write_text("a note")
    with pytest.raises(CompressoError, match=r"holds mine\.txt"):
        ran(output, tiny_folder, instructions, *stages, overwrite=True)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.usefixtures("quick_reopening")
def test_a_target_that_the_guard_refused_is_written_on_resume_without_training_again(
    tiny_folder: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    stages = [gate_taylor(family=TARGETS), recover(2)]
    whole = ran(tmp_path / "whole", tiny_folder, instructions, *stages)
    refuse, n, done = execution.Execution._refuse_collapse, [*TARGETS].index(name), list[str]()
    verdicts = iter([*[None] * n, CollapseError("refused")])

    def refuses(*given: Any, **how: Any) -> None:
        if (verdict := next(verdicts, None)) is not None:
            raise verdict
        refuse(*given, **how)

    entered = execution.entered

    def watched(job: Job, act: Act) -> Any:
        done.append(act.label)
        return entered(job, act)

    monkeypatch.setattr(execution.Execution, "_refuse_collapse", refuses)
    monkeypatch.setattr(execution, "entered", watched)
    with pytest.raises(CollapseError, match="refused"):
        ran(tmp_path / "out", tiny_folder, instructions, *stages)
    assert done == [f"{stage} {t}" for t in [*TARGETS][: n + 1] for stage in ("gate_taylor", "recover")]
    done.clear()
    ran(tmp_path / "out", tiny_folder, instructions, *stages, resume=True)
    assert done == [f"{stage} {t}" for t in [*TARGETS][n + 1 :] for stage in ("gate_taylor", "recover")]
    for target in TARGETS:
        assert outcome(tmp_path / "out" / target) == outcome(whole.folder.parent / target)


@pytest.mark.slow
def test_a_family_killed_around_each_target_ends_in_the_same_bytes(
    forked: Forked, tiny_folder: Path, instructions: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(json.dumps(raw(gate_taylor(family=TARGETS), recover(3, save_every=1))))

    def arguments(output: Path, *more: str) -> list[str]:
        given = ["--model", str(tiny_folder), "--data", str(instructions), "--output", str(output)]
        return ["run", str(recipe), *given, "--measure", "none", "--allow-collapsed", *more]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, log = forked(arguments(whole))
    assert code == 0, log
    resume: list[str] = []
    for phase, at in (("recover", 2), ("saved", 2), ("scores", 1), ("recover", 2), ("saved", 4)):
        code, log = forked(arguments(killed, *resume), event="kill", phase=phase, at=at)
        assert code == -9, log
        assert not killed.exists()
        resume = ["--resume"]
    code, log = forked(arguments(killed, *resume))
    assert code == 0, log
    for name in TARGETS:
        assert outcome(killed / name) == outcome(whole / name)


@pytest.fixture(scope="module")
def table(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the tiny model, by hand: 1 + 3 x (4 + 6) = 31 ms."""
    model = meta_model(open_source(tiny_folder))
    facts, conditions = shape_facts(arch_for(model.config), model), Conditions("torch", "decode", 1, 24, "float32")
    curves = {0: 0.0, 1: 1.5, 2: 2.0, 4: 4.0}, {0: 0.0, 12: 2.5, 24: 3.0, 48: 6.0}
    path = tmp_path_factory.mktemp("tables") / "latency.json"
    path.write_text(LatencyTable(facts, machine_here(), conditions, 1.0, *curves).to_json())
    return path


ZIPLM = {"ziplm": {"rounds": 3, "search": {"evaluations": 4}, "examples": 8, "judge_rows": 2, "steps": 3}}
TAUGHT = {"token_distill": {"steps": 2, "batch": 4, "micro_batch": 4, "lr": 1e-3}}


@pytest.mark.usefixtures("quick_reopening")
def test_several_speedups_are_a_family_each_within_its_time(
    tiny_folder: Path, instructions: Path, tmp_path: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    times = {"speedup": "1.2x,1.5,2x", "latency_table": table}
    result = ran(output, tiny_folder, instructions, ZIPLM, TAUGHT, **times)
    assert [*result.family] == ["1.2x", "1.5x", "2x"]
    before: Plan | None = None
    for name, folder in result.family.items():
        records = RunRecords.checked(json.loads((folder / "records.json").read_text()), name)
        numbers = records.report.models[1].measurements
        (found,) = [one for one in numbers if one.name.startswith("decode_ms/") and one.how == "estimated"]
        assert found.value <= 31 / float(name.rstrip("x")) + 1e-9
        kept = Plan.from_json((folder / "plan.json").read_text())
        assert before is None or all(set(kept.kept[axis]) <= set(units) for axis, units in before.kept.items())
        before = kept
        assert (records.stages[f"token_distill {name}"].model_extra or {})["updates"] == 2
    capsys.readouterr()
    show(result, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told == {name: json.loads((folder / "records.json").read_text()) for name, folder in result.family.items()}


@pytest.mark.parametrize(
    ("speedup", "message"),
    [
        ("1.5x,1.2x", r"speedup='?1\.5x,1\.2x'?: several targets are met one after the other; wanted them rising"),
        ("1.5x,1.5x", r"wanted them rising"),
        ("1.5x,fast", r"wanted at least 1, such as 1\.5x"),
        ("1.5x,40x", r"below its floor of 1 ms: 1 ms of embeddings and head.*; give targets of at most 30\.85x"),
    ],
)
def test_speedups_that_make_no_family_are_refused(speedup: str, message: str, tiny_folder: Path, table: Path) -> None:
    with pytest.raises(BudgetError, match=message) as refused:
        compresso.plan(raw(ZIPLM, TAUGHT), tiny_folder, speedup=speedup, latency_table=table)
    assert len(str(refused.value).splitlines()) == 1


def test_a_family_is_one_of_a_single_stage(tiny_folder: Path, table: Path) -> None:
    two = raw("gate_taylor", {"magnitude_structured": {}})
    with pytest.raises(RecipeError, match=r"several targets are those of one stage, .* has 2 with a budget"):
        compresso.plan(two, tiny_folder, speedup="1.2x,1.5x", latency_table=table)
