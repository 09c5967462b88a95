"""Experts of a mixture leave; the router chooses among those that stay (Lu and others' Expert Drop as in arXiv
2406.02500, section 3; REAP, arXiv 2510.13999).

Section 3, Expert Drop. Scores, one pass over the dense model:
    probability     the router's probability of each expert, summed over tokens, chosen or not; in DeepSeek's families
                    (V2, V3, GLM-4-MoE) the weights of the chosen
    frequency       how often each was chosen
    reap            mean of weight x norm of the output, over the tokens that chose it
    reconstruction  error of the layer's output without it, another one chosen in its place
Layer-wise: each layer keeps its best, the same number (`pool: layer`), which a stock config holds. Global: the lowest
of all layers leave (`pool: global`), the published script's default; layers then keep unequal numbers, which the layout
native holds for the families that have one; transformers reads it, and vLLM, by the file beside the weights.
Removal: rows of the router leave with their experts, its correction, too; probabilities are over those that stay; as
many are chosen for a token as before.
Merging, instead of dropping (`merge`, after M-SMoE, arXiv 2310.01334, section 3.1): an expert that leaves is averaged
into the one of those that stay that is most like it, by how often each was chosen, its channels aligned first. Alike is
the mean of two cosines: of their routed probabilities over tokens, and of what they write on average.

Departures: of the published code's `preserve_gate`, which keeps rows of experts that are gone, nothing is here. top-k
never falls: fewer experts than that are refused before calibration. REAP's weights are made to add up to 1 before they
are used, whatever the model does, as its authors' code does since 2026. It is a mean: where routers load experts
unequally, one that most tokens choose can have the lowest score, and the run then says so (measured on trained mixtures
of 6.4M in docs/log.md). Groups of experts keep as many each. An expert that no token chose has a frequency and a REAP
score of 0 and leaves first. The published calibration is C4, 128 x 2,048; here it is a part of the run's data, since
experts are scored for what they will be asked. M-SMoE groups by routing alone, keeps every row of the router and sends
a group's tokens to the merged expert; here the rows of those that leave leave, too: any engine reads the result.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt, Le
from torch import Tensor
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.arch.routers import routing_of
from compresso.core.axis import Axis, Kind
from compresso.core.budget import Budget
from compresso.core.cost import CostModel
from compresso.core.expert_merging import joined, likeness, shares
from compresso.core.plan import Plan
from compresso.edit.merge_experts import Merging, merge_
from compresso.errors import ArchError
from compresso.job import Job
from compresso.observe.expert_likeness import LIKENESS_FOLDS, liked_together
from compresso.observe.experts import FOLDS, Looked, Router, routed
from compresso.observe.observe import Stats, observe
from compresso.solve.experts import best_of_all, best_of_layers, choices_lost, even_counts, said_of_counts
from compresso.stage import Calibrates, Effects, Passes, stage

log = logging.getLogger(__name__)

_MOST_EXACT = 16
"""Experts up to which reconstruction runs all of them on every token."""
_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


@stage(
    "drop_experts",
    title="drops the experts of each layer that are routed to, or write, least",
    paper="2406.02500",
    effects=Effects.SHAPES,
    needs=("data",),
    once="its share is one of experts, and budgets count none",
    when=(
        "To fit a mixture of experts into less memory. Calibrate on what it will be asked: experts of other subjects"
        " score low on any one kind of text."
    ),
    failures=(
        "No faster: a token takes as many experts as before. How much may leave differs between models: look at the"
        " share of tokens that lose an expert, and at generated text."
    ),
)
class DropExperts:
    """Knobs of dropping experts.

    Args:
        score: "probability", "frequency", "reap" or "reconstruction" (of at most 16 experts a layer).
        keep: share of each layer's experts that stay (of all of them with pool: global); rounded up to whole experts,
            and to as many in each group.
        pool: "layer", or "global", whose unequal numbers the layout native alone holds, where a family has it.
        merge: average those that leave into those that stay, instead of dropping them; every expert then runs on every
            token of the calibration, and channels are aligned by an assignment that grows with the cube of the width.
        calibrates: see `Calibrates`.
    """

    score: Looked = "probability"
    keep: Annotated[float, Gt(0), Le(1)] = 0.75
    pool: Literal["layer", "global"] = "layer"
    merge: bool = False
    calibrates: Calibrates = Calibrates()

    def budget(self) -> Budget | None:
        """None: a share of experts is no share of a model; see `dry_run_plan`."""
        return None

    def dry_run_plan(self, axes: Sequence[Axis], cost: CostModel) -> Plan:
        """A plan of as many experts; of one pool the most unequal there is, since scores may choose it. Raises
        ValueError where routers choose among more than stay.
        """
        experts = _experts(axes)
        lowest_first = {axis.name: i - torch.arange(axis.size) / axis.size for i, axis in enumerate(experts)}
        return self._chosen(experts, lowest_first)

    def remarks(self, model: PreTrainedModel, arch: Arch) -> Sequence[str]:
        """Whose numbers a plan of one pool shows; those of layers that are not what was asked for."""
        if self.pool == "layer":
            return said_of_counts(_experts(arch.axes(model)), self.keep)
        return ["pool=global: numbers of experts are shown as unequal as they may become; scores choose them"]

    def check(self, model: PreTrainedModel, arch: Arch) -> None:
        """Refuse what cannot be scored, or written. Raises ArchError."""
        axes = [axis for axis in arch.axes(model) if axis.kind == Kind.EXPERT]
        if not axes:
            raise ArchError(
                f"drop_experts: {arch.name} has no experts that could leave; use a stage that removes heads, channels"
                " or layers"
            )
        if self.score == "reconstruction" and (wide := [axis for axis in axes if axis.size > _MOST_EXACT]):
            raise ArchError(
                f"drop_experts: score=reconstruction runs every expert on every token, and {wide[0].name} has"
                f" {wide[0].size}, more than {_MOST_EXACT}; give score: reap"
            )

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """One pass over the calibration data; in it the chosen experts run once more for REAP's norms, and all of them
        for reconstruction and again for what merging compares.
        """
        axes = arch.axes(model)
        again = 0
        for axis in (axis for axis in axes if axis.kind == Kind.EXPERT):
            router = model.get_submodule(axis.gates[0].module)
            more = {"reap": routing_of(router).top_k, "reconstruction": axis.size}.get(self.score, 0)
            again += (more + axis.size * self.merge) * _numbers(model, axis)
        macs = float(CostModel(axes, arch.weights(model))().macs)
        return [Passes("calibration", self.calibrates.examples, 1 + again / macs)]

    def merging(self, model: PreTrainedModel, arch: Arch) -> Merging | None:
        """What averaging takes; layers of a model have experts of one width."""
        axes = _experts(arch.axes(model))
        left = even_counts(axes, self.keep)
        leave = sum(axis.size - left[axis.name] for axis in axes)
        if not self.merge or not leave:
            return None
        width = next(axis.size for axis in arch.axes(model) if axis.kind == Kind.EXPERT_CHANNEL)
        return Merging(leave, width, _numbers(model, axes[0]) // width)

    def __call__(self, job: Job) -> Job:
        """Score, choose, shrink."""
        axes = _experts(job.arch.axes(job.model))
        mixtures = {axis.name: _router(job.model, axis) for axis in axes}
        self._chosen(axes, {axis.name: torch.zeros(axis.size) for axis in axes})  # feasible, before anything runs
        for one in said_of_counts(axes, self.keep) if self.pool == "layer" and not job.quiet else ():
            log.warning("drop_experts: %s", one)
        same = job.same("drop_experts", self)
        folds, sites = FOLDS, [routed(mixtures, self.score)]
        if self.merge:
            folds, sites = {**FOLDS, **LIKENESS_FOLDS}, [*sites, liked_together(mixtures)]
        fold = {f"{axis.name} {what}": one for axis in axes for what, one in folds.items()}
        batches = self.calibrates.read(job.batches(self.calibrates.batch, "drop_experts"))
        stats = observe(job.model, sites, fold, batches, how=job.observing("scores", same))
        n = self.calibrates.among(len(job.rows))
        side_by_side = {axis.name: self._scores(axis, stats, n) for axis in axes}
        plan = self._chosen(axes, {name: scores[self.score] for name, scores in side_by_side.items()})
        facts = self._facts(axes, plan, stats, side_by_side)
        if self.merge:
            facts["merged"] = self._merge(axes, plan, mixtures, stats, side_by_side)
        if not job.quiet:
            self._warn(facts)
        return job.without(plan.masks(axes), "drop_experts", **facts)

    def _warn(self, facts: Mapping[str, Any]) -> None:
        """Say what tokens lose, and where other experts are chosen less."""
        if facts["damage_rate"]:
            log.warning(
                "drop_experts: %.0f %% of tokens lose one of the experts that they chose, the mean over layers",
                100 * facts["damage_rate"],
            )
        lost, least = facts["choices_lost"], facts["choices_lost_at_least"]
        if lost > 2 * least + 0.01:
            blind = "; reap is a mean over the tokens that choose an expert and does not see how many do"
            log.warning(
                "drop_experts: %.0f %% of the choices fell on experts that leave, %.0f %% on as many of the least"
                " chosen%s; where loads are as unequal, score: probability loses less",
                100 * lost,
                100 * least,
                blind if self.score == "reap" else "",
            )

    def _merge(
        self,
        axes: Sequence[Axis],
        plan: Plan,
        mixtures: Mapping[str, Router],
        stats: Mapping[str, Stats],
        scores: Mapping[str, Mapping[str, Tensor]],
    ) -> dict[str, dict[int, list[int]]]:
        """Average what leaves into what stays; who joined whom, by layer and number."""
        found: dict[str, dict[int, list[int]]] = {}
        for axis in axes:
            outputs = stats[f"{axis.name} outputs"].total.reshape(axis.size, -1)
            like = likeness(stats[f"{axis.name} routing"].total, outputs)
            groups = joined(like.cpu(), plan.kept[axis.name])
            found[axis.name] = {one: members for one, members in groups.items() if members}
            for one, members in found[axis.name].items():
                together = [one, *members]
                merge_(mixtures[axis.name].experts, together, shares(scores[axis.name]["frequency"], together))
        return found

    def _chosen(self, axes: Sequence[Axis], scores: Mapping[str, Tensor]) -> Plan:
        """The plan without the lowest scores."""
        if self.pool == "global":
            return best_of_all(axes, scores, self.keep)
        return best_of_layers(axes, scores, even_counts(axes, self.keep))

    def _scores(self, axis: Axis, stats: Mapping[str, Stats], n: int) -> dict[str, Tensor]:
        """The scores of a layer's experts that this pass over `n` examples gives, each [size], float64."""
        often = torch.bincount(stats[f"{axis.name} numbers"].total.long().flatten(), minlength=axis.size).double()
        found = {"probability": stats[f"{axis.name} probability"].total.cpu() / n}
        found["frequency"] = often
        if self.score == "reap":
            found["reap"] = stats[f"{axis.name} score"].total.cpu() / often.clamp(min=1)
        elif self.score == "reconstruction":
            seen = stats[f"{axis.name} score"]
            found["reconstruction"] = seen.total.cpu() / seen.n
        return found

    def _facts(
        self,
        axes: Sequence[Axis],
        plan: Plan,
        stats: Mapping[str, Stats],
        scores: Mapping[str, Mapping[str, Tensor]],
    ) -> dict[str, Any]:
        """For the records: what was scored, what stays, and how many tokens lose one of their experts."""
        layers: dict[str, Any] = {}
        touched, tokens = 0, 0
        for axis in axes:
            numbers = stats[f"{axis.name} numbers"].total.long()
            stays = torch.zeros(axis.size, dtype=torch.bool)
            stays[list(plan.kept[axis.name])] = True
            lose = ~stays[numbers].all(-1)
            touched, tokens = touched + int(lose.sum()), tokens + len(numbers)
            mine = scores[axis.name][self.score]
            layers[axis.name] = {
                "scores": {name: found.tolist() for name, found in scores[axis.name].items()},
                "quantiles": torch.quantile(mine, torch.tensor(_QUANTILES, dtype=mine.dtype)).tolist(),
                "starved": int((scores[axis.name]["frequency"] == 0).sum()),
                "tokens_that_lose_one": float(lose.double().mean()),
            }
        asked = {axis.name: axis.size - int(axis.size * (1 - self.keep) + 1e-9) for axis in axes}
        rounded = {n: {"asked": k, "kept": len(plan.kept[n])} for n, k in asked.items() if k != len(plan.kept[n])}
        lost, least = choices_lost({name: found["frequency"] for name, found in scores.items()}, plan)
        return {
            "score": self.score,
            "choices_lost": lost,
            "choices_lost_at_least": least,
            "calibration_tokens": tokens // len(axes),
            "damage_rate": touched / tokens,
            "experts": layers,
            **({"experts_a_layer_for_equal_groups": rounded} if rounded and self.pool == "layer" else {}),
        }


def _experts(axes: Sequence[Axis]) -> list[Axis]:
    """The axes of experts. Raises ValueError without any."""
    found = [axis for axis in axes if axis.kind == Kind.EXPERT]
    if not found:
        raise ValueError(
            "the model has no experts that could leave; use a stage that removes heads, channels or layers"
        )
    return found


def _numbers(model: PreTrainedModel, axis: Axis) -> int:
    """Entries of the matrices of one of a layer's experts."""
    stacks = (model.get_parameter(f"{axis.container}.experts.{name}") for name in ("gate_up_proj", "down_proj"))
    return sum(stack.numel() // len(stack) for stack in stacks)


def _router(model: PreTrainedModel, axis: Axis) -> Router:
    """The modules of a layer's mixture."""
    return Router(model.get_submodule(axis.gates[0].module), model.get_submodule(f"{axis.container}.experts"))
