"""The knob `rounds` of a stage that removes units: cut a little, repair, train a slice, and cut again.

    stages: [gate_taylor: {keep: 0.5, rounds: 4, repair: residual}, recover: {steps: 600}]

takes gate_taylor, repair and recover in turn, four times. A round is the stage and all behind it that makes up for what
left: repairs and trainings that change weights, and neither zero nor round them. Each act of a round is a stage of the
run, with records, a journal and a place among the finished stages of its own, so that a run killed in any round goes on
in it.

Budgets step down by equal factors (`geometric_share`), counted on the model that the first round received: so the last
one ends where a single cut would, whatever rounding left over on the way. The updates of each training are shared out
evenly, those of a selector that trains among them; every round has its own warm-up and schedule, and an order of
examples of its own, since the same seed would show each round the same ones.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from compresso.core.axis import Axis
from compresso.core.quantities import Cost
from compresso.errors import RecipeError
from compresso.job import Job
from compresso.runner.repairs import STAGE as REPAIR
from compresso.solve.gradual import geometric_share
from compresso.stage import Compresses, Effects, Learning, Learns, Shrinks, Stage, card
from compresso.training.duration import part
from compresso.training.launch import is_main_process
from compresso.training.noise import mixed_seed

KNOB = "rounds"


@dataclass(frozen=True)
class Begun:
    """What the first round received.

    Args:
        whole: amount of what the budget counts.
        sizes: kind -> units of its smallest axis, of kinds whose floor is their share.
    """

    whole: float
    sizes: Mapping[str, int]

    @classmethod
    def of(cls, stage: Shrinks, axes: Sequence[Axis], cost: Cost) -> "Begun":
        """Of a stage that is about to cut for the first time."""
        budget = stage.budget()
        assert budget is not None  # `taken` refuses stages without one
        shares = [kind for kind, floor in budget.floor.items() if floor == "keep"]
        sizes = {str(kind): [axis.size for axis in axes if axis.kind == kind and axis.size] for kind in shares}
        return cls(float(cost().count(budget.of)), {kind: min(found) for kind, found in sizes.items() if found})


@dataclass(frozen=True)
class Act:
    """A stage's turn in a run.

    Args:
        name: of the stage.
        stage: as the recipe has it, for all rounds together.
        turn, turns: which round it stands in, from 1, of how many.
    """

    name: str
    stage: Stage
    turn: int = 1
    turns: int = 1

    @property
    def label(self) -> str:
        """What records and tables call it."""
        return self.name if self.turns == 1 else f"{self.name} {self.turn}/{self.turns}"

    @property
    def folder(self) -> str:
        """What its folders are called."""
        return self.name if self.turns == 1 else f"{self.name}-{self.turn}"

    @property
    def cuts(self) -> bool:
        """Whether it steps down to its round's budget."""
        return self.turns > 1 and Effects.SHAPES in card(self.name).effects

    @property
    def keep(self) -> float:
        """The share of what the first round received that its round may keep."""
        return geometric_share(self.keep_in_the_end, self.turn, self.turns)

    @property
    def keep_in_the_end(self) -> float:
        """The share of what the first round received that the last may keep."""
        budget = cast(Shrinks, self.stage).budget()
        assert budget is not None
        return budget.keep

    @property
    def of(self) -> str:
        """What the budget counts."""
        budget = cast(Shrinks, self.stage).budget()
        assert budget is not None
        return budget.of

    def taken(self, begun: Begun | None, cost: Cost | None, examples: int | None) -> Stage:
        """The stage of this turn: with the share that its round leaves of the model as it is by now, and with its share
        of the updates.

        Args:
            begun: what the first round received; None where nothing is cut.
            cost: counts the model as it is by now, where something is cut.
            examples: of training; None where nobody knows, and epochs stay whole.
        """
        stage = self.stage
        if self.turns == 1:
            return stage
        if begun is not None and cost is not None:
            stage = self._cut(begun, float(cost().count(self.of)))
        learning = whole_learning(stage)
        if learning is None or (examples is None and learning.updates is None):
            return stage
        if examples is None and not all(isinstance(phase, int) for phase in learning.phases):
            most = -(-cast(int, learning.updates) // self.turns)
            return cast(Stage, replace(cast(Any, stage), max_steps=most))
        whole = sum(learning.trains.updates(examples or 1, learning.phases))
        share = part(whole, self.turn, self.turns)
        return stage if not share else cast(Stage, replace(cast(Any, stage), max_steps=share))

    def _cut(self, begun: Begun, now: float) -> Stage:
        """The stage with a budget of the model as it is by now."""
        budget = cast(Shrinks, self.stage).budget()
        assert budget is not None
        changed: dict[str, Any] = {"keep": min(1.0, self.keep * begun.whole / now)}
        if "keep" in budget.floor.values():
            sizes = begun.sizes
            changed["floor"] = {
                kind: round(self.keep * sizes[kind]) if floor == "keep" and kind in sizes else floor
                for kind, floor in budget.floor.items()
            }
        return cast(Stage, replace(cast(Any, self.stage), **changed))


def acts(stages: Sequence[tuple[str, Stage]], rounds: Mapping[str, int]) -> tuple[Act, ...]:
    """The turns of a run, in order.

    Args:
        stages: name and stage, as the recipe has them.
        rounds: of stages that have more than one.
    """
    found: list[Act] = []
    at = 0
    while at < len(stages):
        n = rounds.get(stages[at][0], 1)
        end = at + 1
        while n > 1 and end < len(stages) and _makes_up(*stages[end]):
            end += 1
        found += [Act(name, stage, turn, n) for turn in range(1, n + 1) for name, stage in stages[at:end]]
        at = end
    return tuple(found)


def without_knob(name: str, knobs: Any, recipe: str) -> tuple[Any, int]:
    """The knobs of a stage without `rounds`, and how many these are.

    Raises:
        RecipeError: for what is no number of rounds, and a stage that removes nothing.
    """
    if not isinstance(knobs, dict) or KNOB not in knobs:
        return knobs, 1
    value = knobs[KNOB]
    where = f"recipe {recipe}: stage '{name}'"
    if Effects.SHAPES not in card(name).effects:
        raise RecipeError(
            f"{where} removes no units, so there is nothing to cut in rounds; give rounds to the stage that does"
        )
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RecipeError(f"{where}: rounds={value!r}: wanted a whole number of at least 1, such as 4")
    return {key: one for key, one in knobs.items() if key != KNOB}, value


def check_rounds(turns: Sequence[Act], recipe: str, examples: int | None = None) -> None:
    """Refuse stages that cannot be repeated, and trainings too short to be shared out.

    Args:
        turns: of the run.
        recipe: its name.
        examples: of training; None where nobody knows yet, and epochs pass.

    Raises RecipeError, naming the stage and what would do.
    """
    cutting = ""
    for act in turns:
        if act.turns == 1 or act.turn > 1:
            continue
        where = f"recipe {recipe}: stage '{act.name}'"
        if act.cuts:
            cutting = act.name
            if once := card(act.name).once:
                raise RecipeError(f"{where}: rounds={act.turns}: it is not repeated, since {once}; leave rounds out")
            budget = cast(Shrinks, act.stage).budget()
            if budget is None or budget.keep == 1:
                raise RecipeError(
                    f"{where}: rounds={act.turns} step down to a share that stays, and it has none below 1; give keep,"
                    " such as keep: 0.5, or leave rounds out"
                )
        learning = whole_learning(act.stage)
        epochs = learning is not None and not all(isinstance(phase, int) for phase in learning.phases)
        if learning is None or (epochs and examples is None):
            continue
        phases = learning.trains.updates(examples or 1, learning.phases)
        least = act.turns * max(sum(phase > 0 for phase in phases), 1)
        if 0 < sum(phases) < least:
            raise RecipeError(
                f"{where}: {sum(phases)} updates are fewer than the {least} that rounds={act.turns} of {cutting} take"
                " at least; give more steps (or max_steps), or fewer rounds"
            )


def whole_learning(stage: Stage) -> Learning | None:
    """What a stage trains; None where it trains nothing."""
    return stage.learning() if isinstance(stage, Learns) else None


def told(turns: Sequence[Act]) -> list[str]:
    """A sentence for each stage in rounds: where its budgets step, or how its updates are shared out."""
    found: list[str] = []
    for act in turns:
        if act.turns == 1 or act.turn > 1:
            continue
        name, n = act.name, act.turns
        if act.cuts:
            shares = ", ".join(f"{geometric_share(act.keep_in_the_end, turn, n):.4g}" for turn in range(1, n + 1))
            found.append(f"{name}: {n} rounds, by equal factors: {shares} of {act.of} stay")
        learning = whole_learning(act.stage)
        if learning is None:
            continue
        if not all(isinstance(phase, int) for phase in learning.phases):
            found.append(f"{name}: its updates are shared out evenly over {n} rounds")
        elif whole := learning.updates:
            shares = ", ".join(str(part(whole, turn, n)) for turn in range(1, n + 1))
            found.append(f"{name}: {shares} of its {whole} updates, round by round")
    return found


def entered(job: Job, act: Act) -> tuple[Job, Stage, dict[str, Any]]:
    """The job that an act is given, the stage that it is, and what its records say of the round.

    The first round's count is in the records of its first act, so that a resumed run finds it there.
    """
    if act.turns == 1:
        return job, act.stage, {}
    begun, cost = None, job.cost() if act.cuts else None
    facts: dict[str, Any] = {"round": act.turn, "rounds": act.turns}
    if cost is not None:
        if act.turn == 1:
            begun = Begun.of(cast(Shrinks, act.stage), job.arch.axes(job.model), cost)
        else:
            first = job.records[replace(act, turn=1).label]["in_rounds"]
            begun = Begun(first["whole"], first["sizes"])
        facts |= {"keep": act.keep, "of": act.of, "whole": begun.whole, "sizes": dict(begun.sizes)}
    stage = act.taken(begun, cost, len(job.rows))
    if (learning := whole_learning(stage)) is not None:
        facts["updates"] = sum(learning.trains.updates(len(job.rows), learning.phases))
    seed = job.seed if act.turn == 1 else mixed_seed("round", job.seed, act.turn)
    return replace(job, seed=seed, removal=None), stage, {"in_rounds": facts}


def left(after: Job, before: Job, act: Act, facts: Mapping[str, Any]) -> Job:
    """The job that follows an act: what the stage noted, and the adapters that it kept, are under the act's name."""
    if act.turns == 1:
        return after
    records = dict(after.records)
    noted = records.pop(act.name, {})
    if before.adapters is not None and (kept := before.adapters / act.name).is_dir() and is_main_process():
        shutil.rmtree(named := before.adapters / act.folder, ignore_errors=True)
        kept.rename(named)
    return replace(after, records={**records, act.label: {**noted, **facts}}, seed=before.seed)


def _makes_up(name: str, stage: Stage) -> bool:
    """Whether a stage behind a selector belongs to its rounds."""
    changes_weights = card(name).effects == Effects.WEIGHTS
    return changes_weights and (name == REPAIR or isinstance(stage, Learns)) and not isinstance(stage, Compresses)
