"""Removal in rounds: cut a little, repair, train a slice, and cut again; and families of targets, of which each round
writes one.

    stages: [gate_taylor: {keep: 0.5, rounds: 4, repair: residual}, recover: {steps: 600}]
    stages: [ziplm: {family: {1.2x: 0.83, 2x: 0.5}, of: milliseconds}, token_distill: {steps: 600}]

The first takes gate_taylor, repair and recover in turn, four times. A round is the stage and all behind it that makes
up for what left: repairs and trainings that change weights, and neither zero nor round them. Each act of a round is a
stage of the run, with records, a journal and a place among the finished stages of its own, so that a run killed in any
round goes on in it.

Budgets are counted on the model that the first round received: so the last one ends where a single cut would, whatever
rounding left over on the way. Under `rounds` they step down by equal factors (`geometric_share`), and the updates of
each training are shared out evenly, those of a selector that trains among them. Under `family` they are those that are
given, each result is a checkpoint of its own (`OUTPUT/1.2x`), and each target has all of the updates, as ZipLM trains
between its own (arXiv 2302.04089). Every round has its own warm-up and schedule, and an order of examples of its own,
since the same seed would show each round the same ones.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from compresso.arch.queries import WITHIN, axes_of
from compresso.core.axis import Axis
from compresso.core.budget import Budget, InfeasibleBudget
from compresso.core.quantities import Cost
from compresso.errors import BudgetError, RecipeError
from compresso.job import Job
from compresso.runner.repairs import STAGE as REPAIR
from compresso.runner.round_knobs import Steps
from compresso.stage import Compresses, Effects, Learning, Learns, Shrinks, Stage, card
from compresso.training.duration import part
from compresso.training.launch import is_main_process
from compresso.training.noise import mixed_seed


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
    def of(cls, stage: Stage, axes: Sequence[Axis], cost: Cost) -> "Begun":
        """Of a stage that is about to cut for the first time."""
        budget = budget_of(stage)
        shares = [kind for kind, floor in budget.floor.items() if floor == "keep"]
        sizes = {str(kind): [axis.size for axis in axes if axis.kind == kind and axis.size] for kind in shares}
        return cls(float(cost().count(budget.of)), {kind: min(found) for kind, found in sizes.items() if found})


@dataclass(frozen=True)
class Act:
    """A stage's turn in a run.

    Args:
        name: of the stage.
        stage: as the recipe has it, for all rounds together.
        turn: which round it stands in, from 1.
        steps: the rounds; None for a stage that stands in none.
        last: whether it ends its round.
    """

    name: str
    stage: Stage
    turn: int = 1
    steps: Steps | None = None
    last: bool = False

    @property
    def turns(self) -> int:
        """How many rounds there are."""
        return 1 if self.steps is None else len(self.steps.shares)

    @property
    def label(self) -> str:
        """What records and tables call it."""
        if self.steps is None:
            return self.name
        return f"{self.name} {self.steps.names[self.turn - 1] if self.steps.names else f'{self.turn}/{self.turns}'}"

    @property
    def folder(self) -> str:
        """What its folders are called."""
        return self.name if self.steps is None else f"{self.name}-{self.turn}"

    @property
    def target(self) -> str:
        """The name of the result that is written behind it; "" for none."""
        return self.steps.names[self.turn - 1] if self.last and self.steps is not None and self.steps.names else ""

    @property
    def cuts(self) -> bool:
        """Whether it steps down to its round's budget."""
        return self.steps is not None and Effects.SHAPES in card(self.name).effects

    @property
    def keep(self) -> float:
        """The share of what the first round received that its round may keep."""
        assert self.steps is not None  # asked of acts in rounds alone
        return self.steps.shares[self.turn - 1]

    def taken(self, begun: Begun | None, cost: Cost | None, examples: int | None) -> Stage:
        """The stage of this turn: with the share that its round leaves of the model as it is by now, and with its share
        of the updates.

        Args:
            begun: what the first round received; None where nothing is cut.
            cost: counts the model as it is by now, where something is cut.
            examples: of training; None where nobody knows, and epochs stay whole.
        """
        stage = self.stage
        if self.steps is None:
            return stage
        if begun is not None and cost is not None:
            stage = self._cut(begun, float(cost().count(budget_of(stage).of)))
        learning = learning_of(stage)
        if self.steps.names or learning is None or (examples is None and learning.updates is None):
            return stage
        if examples is None and not all(isinstance(phase, int) for phase in learning.phases):
            return _with(stage, max_steps=-(-cast(int, learning.updates) // self.turns))
        whole = sum(learning.trains.updates(examples or 1, learning.phases))
        share = part(whole, self.turn, self.turns)
        return _with(stage, max_steps=share) if share else stage

    def updates(self, whole: int) -> int:
        """What falls to its round of so many updates."""
        return whole if self.steps is None or self.steps.names else part(whole, self.turn, self.turns)

    def _cut(self, begun: Begun, now: float) -> Stage:
        """The stage with a budget of the model as it is by now."""
        budget = budget_of(self.stage)
        changed: dict[str, Any] = {"keep": min(1.0, self.keep * begun.whole / now)}
        if "keep" in budget.floor.values():
            sizes = begun.sizes
            changed["floor"] = {
                kind: round(self.keep * sizes[kind]) if floor == "keep" and kind in sizes else floor
                for kind, floor in budget.floor.items()
            }
        return _with(self.stage, **changed)


def acts(stages: Sequence[tuple[str, Stage]], rounds: Mapping[str, Steps]) -> tuple[Act, ...]:
    """The turns of a run, in order.

    Args:
        stages: name and stage, as the recipe has them.
        rounds: of the stages that have some.
    """
    found: list[Act] = []
    at = 0
    while at < len(stages):
        steps, end = rounds.get(stages[at][0]), at + 1
        while steps is not None and end < len(stages) and _makes_up(*stages[end]):
            end += 1
        found += [
            Act(name, stage, turn + 1, steps, last=steps is not None and name == stages[end - 1][0])
            for turn in range(1 if steps is None else len(steps.shares))
            for name, stage in stages[at:end]
        ]
        at = end
    return tuple(found)


def check_rounds(turns: Sequence[Act], recipe: str, examples: int | None = None) -> None:
    """Refuse trainings too short to be shared out, and what stands behind a family.

    Args:
        turns: of the run.
        recipe: its name.
        examples: of training; None where nobody knows yet, and epochs pass.

    Raises RecipeError, naming the stage and what would do.
    """
    cutting = family = ""
    for act in turns:
        where = f"recipe {recipe}: stage '{act.name}'"
        if family and act.label.partition(" ")[2] not in _names(turns):
            raise RecipeError(
                f"{where} stands behind '{family}', whose targets are written before it; leave it out, or give the"
                " stage one keep in place of a family"
            )
        if act.steps is None or act.turn > 1:
            continue
        cutting = act.name if act.cuts else cutting
        family = cutting if act.steps.names else family
        learning = learning_of(act.stage)
        epochs = learning is not None and not all(isinstance(phase, int) for phase in learning.phases)
        if act.steps.names or learning is None or (epochs and examples is None):
            continue
        phases = learning.trains.updates(examples or 1, learning.phases)
        least = act.turns * max(sum(phase > 0 for phase in phases), 1)
        if 0 < sum(phases) < least:
            raise RecipeError(
                f"{where}: {sum(phases)} updates are fewer than the {least} that rounds={act.turns} of {cutting} take"
                " at least; give more steps (or max_steps), or fewer rounds"
            )


def told(turns: Sequence[Act]) -> list[str]:
    """A sentence for each stage in rounds: where its budgets step, or how its updates are shared out."""
    found: list[str] = []
    for act in turns:
        if act.steps is None or act.turn > 1:
            continue
        name, n, names = act.name, act.turns, act.steps.names
        if act.cuts:
            shares = ", ".join(f"{share:.4g}" for share in act.steps.shares)
            how = f"{n} targets ({', '.join(names)})" if names else f"{n} rounds, by equal factors"
            found.append(f"{name}: {how}: {shares} of {budget_of(act.stage).of} stay")
        learning = learning_of(act.stage)
        if learning is None:
            continue
        if names:
            found.append(f"{name}: all of its updates for each of {n} targets")
        elif not all(isinstance(phase, int) for phase in learning.phases):
            found.append(f"{name}: its updates are shared out evenly over {n} rounds")
        elif whole := learning.updates:
            shares = ", ".join(str(part(whole, turn, n)) for turn in range(1, n + 1))
            found.append(f"{name}: {shares} of its {whole} updates, round by round")
    return found


def entered(job: Job, act: Act) -> tuple[Job, Stage, dict[str, Any]]:
    """The job that an act is given, the stage that it is, and what its records say of the round.

    The first round's count is in the records of its first act, so that a resumed run finds it there.
    """
    if act.steps is None:
        return job, act.stage, {}
    begun, cost = None, job.cost() if act.cuts else None
    facts: dict[str, Any] = {"round": act.turn, "rounds": act.turns}
    if cost is not None:
        if act.turn == 1:
            begun = Begun.of(act.stage, axes_of(job.arch, job.model, WITHIN), cost)
        else:
            first = job.records[replace(act, turn=1).label]["in_rounds"]
            begun = Begun(first["whole"], first["sizes"])
        of = budget_of(act.stage).of
        facts |= {"keep": act.keep, "of": of, "whole": begun.whole, "sizes": dict(begun.sizes)}
    stage = act.taken(begun, cost, len(job.rows))
    if (learning := learning_of(stage)) is not None:
        facts["updates"] = sum(learning.trains.updates(len(job.rows), learning.phases))
    seed = job.seed if act.turn == 1 else mixed_seed("round", job.seed, act.turn)
    return replace(job, seed=seed, removal=None), stage, {"in_rounds": facts}


def applied(stage: Stage, job: Job, act: Act) -> Job:
    """What the stage leaves. Raises BudgetError where it finds its budget out of reach, which a dry run need not."""
    try:
        return stage(job)
    except InfeasibleBudget as error:
        raise BudgetError(f"stage '{act.label}': {error}") from error


def left(after: Job, before: Job, act: Act, facts: Mapping[str, Any]) -> Job:
    """The job that follows an act: what the stage noted, and the adapters that it kept, are under the act's name."""
    if act.steps is None:
        return after
    records = dict(after.records)
    noted = records.pop(act.name, {})
    if before.adapters is not None and (kept := before.adapters / act.name).is_dir() and is_main_process():
        shutil.rmtree(named := before.adapters / act.folder, ignore_errors=True)
        kept.rename(named)
    return replace(after, records={**records, act.label: {**noted, **facts}}, seed=before.seed)


def budget_of(stage: Stage) -> Budget:
    """The budget of a stage that cuts in rounds."""
    budget = stage.budget() if isinstance(stage, Shrinks) else None
    assert budget is not None  # `round_knobs` refuses stages without one
    return budget


def learning_of(stage: Stage) -> Learning | None:
    """What a stage trains; None where it trains nothing."""
    return stage.learning() if isinstance(stage, Learns) else None


def targets_of(turns: Sequence[Act]) -> tuple[str, ...]:
    """The names of the results of a run; none where there is but one."""
    return tuple(act.target for act in turns if act.target)


def _names(turns: Sequence[Act]) -> set[str]:
    """All names of targets."""
    return {name for act in turns if act.steps is not None for name in act.steps.names}


def _with(stage: Stage, **changed: Any) -> Stage:
    """A stage with other knobs."""
    return cast(Stage, replace(cast(Any, stage), **changed))


def _makes_up(name: str, stage: Stage) -> bool:
    """Whether a stage behind a selector belongs to its rounds."""
    changes_weights = card(name).effects == Effects.WEIGHTS
    return changes_weights and (name == REPAIR or isinstance(stage, Learns)) and not isinstance(stage, Compresses)
