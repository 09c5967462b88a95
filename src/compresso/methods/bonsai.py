"""Bonsai: structured pruning by forward passes alone (Dery et al., arXiv 2402.05406).

Units are key/value groups, single query heads of them, and FFN channels. A round sees new examples, and what is left:

    prior     from one pass; the search is among the units of each module that it thinks least of
    masks     x_i in {0, 1}^columns, each followed by its complement 1 - x_i
    scores    y_i = -loss of the sub-model x_i                                                  (1)
    worth     theta = argmin sum_i (y_i - x_i theta - b)^2 + lambda |theta|^2                   (2)
    removal   units in the order of theta, as long as they fit in p of the received model       (3)

until the budget is met; `distill` is the published adaptation. Nothing has a gradient; a killed run resumes.

Departures; `recipes/bonsai/paper.yaml` takes back some. Units are off with probability 1/2 each: the authors' sampler
switches equally many off in every mask, so that modules do not compare; where it varies one unit of a module (grouped
queries) it tells nothing: it is refused, and leaves alone what shrinks to that. Grouped queries, unknown there: groups
of a layer keep as many query heads, the r-th worst of each leave at once for their sum, and in (2) a head is on only
where its group is. Loss, not perplexity. Ridge, not an L1 penalty by Adam. Each round draws its own examples. The r-th
ends at 1 - r p: what it leaves the next may take; the last meets the budget (there: within 2 %), as do all for equal
widths or multiples. A module keeps a unit (`floor`). Activations not finite are an error, not a prior of 0.
"""

import logging
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le, MultipleOf
from torch import Tensor
from transformers import PreTrainedModel

from compresso.arch.base import Arch
from compresso.arch.queries import axes_of
from compresso.core.axis import Axis, Kind
from compresso.core.budget import Budget
from compresso.core.plan import Plan
from compresso.core.subsets import Sampler, drawn, published_pool
from compresso.core.worth import Regression, worths
from compresso.errors import RecipeError
from compresso.job import Job
from compresso.observe.losses import losses_under
from compresso.observe.priors import Prior, priors
from compresso.solve.rounds import Rounds, n_rounds
from compresso.stage import Calibrates, Effects, Passes, Removes, stage
from compresso.training.noise import mixed_seed
from compresso.training.rounds import RoundJournal

log = logging.getLogger(__name__)
FAINT = 0.1  # of cross-validated taus: below it a round's regression says no more than its prior


@stage(
    "bonsai",
    title="switches units off at random and removes those that the loss of the sub-models does not miss",
    paper="2402.05406",
    effects=Effects.SHAPES,
    needs=("data",),
    when="Where only a forward pass fits the device; masks x examples x rounds forwards are its price.",
    any_task=True,
    failures="Few masks for many units: a tau near 0 in the records says that the prior chose, not the search.",
)
class Bonsai:
    """Knobs of Bonsai.

    Args:
        removes: see `Removes`; of heads, query heads and channels.
        calibrates: see `Calibrates`; the examples of a round.
        round_share: p, the share of the received model that a round removes.
        masks: sub-models a round, half of them the other half's complements.
        sampler: "independent" or "published".
        regression: "ridge" or "published".
        prior: "wanda", "magnitude" (of activations) or "random".
        metric: "loss" or "ppl".
    """

    removes: Removes = Removes(kinds=(Kind.HEAD, Kind.QUERY, Kind.CHANNEL), floor={Kind.HEAD: 1, Kind.CHANNEL: 1})
    calibrates: Calibrates = Calibrates(batches=2, batch=4)
    round_share: Annotated[float, Gt(0), Le(0.5)] = 0.05
    masks: Annotated[int, Ge(10), MultipleOf(2)] = 64
    sampler: Sampler = "independent"
    regression: Regression = "ridge"
    prior: Prior = "wanda"
    metric: Literal["loss", "ppl"] = "loss"

    def __post_init__(self) -> None:
        """Refuse kinds without a prior. Raises ValueError."""
        self.removes.only(Kind.HEAD, Kind.QUERY, Kind.CHANNEL, what="are varied")

    def budget(self) -> Budget:
        """The budget these knobs describe."""
        return self.removes.budget()

    def check(self, model: PreTrainedModel, arch: Arch) -> None:
        """Raise RecipeError for a model of which the published sampler would learn nothing."""
        units = {axis.name: torch.zeros(axis.size) for axis in self._axes(model, arch)}
        try:
            if self.sampler == "published":
                published_pool(units, dict.fromkeys(units, self.round_share))
        except ValueError as error:
            raise RecipeError(f"bonsai: {error}") from error

    def work(self, model: PreTrainedModel, arch: Arch) -> Sequence[Passes]:
        """Each round's prior and sub-models, and the looks before and after it; all counted on the received model."""
        n, forwards = n_rounds(self.removes.keep, self.round_share), 1 + self.masks
        return [Passes("search", n * self.calibrates.examples, forwards), Passes("comparison", 2 * n)]

    def __call__(self, job: Job) -> Job:
        """Mask, score, fit and remove in rounds; what the journal holds of them is removed at once."""
        rounds = Rounds(self._axes(job.model, job.arch), job.cost(), self.budget(), self.round_share)
        same, plan = job.same("bonsai", self), Plan()
        journal = job.rounds("rounds", same)
        done: list[Any] = [] if journal is None else journal.entries()
        if done:
            plan = Plan({name: tuple(units) for name, units in done[-1]["kept"].items()})
            job = job.without(plan.masks(rounds.axes), "bonsai")
        for r in range(len(done), len(rounds)):
            losses, axes = job.rounds(f"losses-{r}", same | {"round": r}), self._axes(job.model, job.arch)
            masks, facts = self._round(job, axes, rounds, r, plan, losses)
            job, plan = job.without(masks, "bonsai"), plan.then(Plan.from_masks(axes, masks))
            facts["masked_minus_smaller"] = job.records["bonsai"]["masked_minus_smaller_max_abs"]
            done.append({"kept": {name: list(units) for name, units in plan.kept.items()}, "facts": facts})
            if journal is not None and losses is not None:
                journal.append(done[-1])
                losses.discard()
        told = [entry["facts"] for entry in done]
        worst = max(one["masked_minus_smaller"] for one in told)
        return job.note("bonsai", **rounds.facts(plan), masked_minus_smaller_max_abs=worst, rounds=told)

    def _round(
        self, job: Job, axes: Sequence[Axis], rounds: Rounds, r: int, plan: Plan, journal: RoundJournal | None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a round leaves of each axis [size], 0 or 1, and its record."""
        seed, calibrates = mixed_seed("bonsai", job.seed, r), self.calibrates
        batches = list(calibrates.read(job.batches(calibrates.batch, f"bonsai {r}")))
        prior = priors(self.prior, job.model, axes, batches, seed)
        pool, x = drawn(self.sampler, prior, self.round_share, self.masks // 2, seed, rounds.fewest(plan, axes))
        how = {"loss": job.task.loss, "journal": journal, "progress": job.progress(), "name": f"round {r + 1}"}
        losses = losses_under(job.model, axes, [pool.masks(row) for row in x], batches, **how)
        clipped = losses.nan_to_num(nan=math.inf).clamp(max=math.log(1e8))
        y = -clipped if self.metric == "loss" else -clipped.exp()  # eq. 1
        worth, tau = worths(self.regression, pool.on(x, axes), y, seed)  # eq. 2
        if tau < FAINT:
            log.warning("round %d: a tau of %.2f; its regression is no better than its prior", r + 1, tau)
        facts = {"seed": seed, "columns": len(pool), "loss": float(clipped.mean()), "tau": tau, **worth.chosen}
        left = rounds.masks(r, plan, axes, job.cost(), pool.scatter(worth.coefficients, math.inf), prior)  # eq. 3
        return left, facts | {"better_than_prior": tau >= FAINT}

    def _axes(self, model: PreTrainedModel, arch: Arch) -> list[Axis]:
        """The axes whose units may leave."""
        return [axis for axis in self.removes.among(axes_of(arch, model, self.removes.kinds)) if axis.size]
