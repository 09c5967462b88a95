"""One level for each module: what a per-layer choice among measured or compressed versions comes down to.

    maximise  sum of worths of the chosen levels    subject to    sum of their costs <= a limit,  one level a module

A multiple-choice knapsack (scipy's `milp`, HiGHS). Costs need not be proportional to anything: they may come from a
table of latencies.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from compresso.core.budget import InfeasibleBudget

GAP = 1e-4
"""Relative distance from the optimum at which the solver may stop."""
SECONDS = 120.0
"""After which the solver gives the best it has found, if that is within the gap."""


def choose_levels(
    worths: Mapping[str, Sequence[float]], costs: Mapping[str, Sequence[float]], limit: float
) -> dict[str, int]:
    """The level of each module with the greatest sum of worths, to a relative gap of 1e-4.

    Args:
        worths: module -> what each of its levels is worth, such as a negative error.
        costs: module -> what each of its levels costs.
        limit: what all chosen levels may cost.

    Returns:
        Module -> index of its level.

    Raises:
        InfeasibleBudget: the cheapest levels cost more.
        ValueError: a module has not as many worths as costs, or the solver finds no answer in time.
    """
    for name in worths:
        if len(worths[name]) != len(costs.get(name, ())) or not len(worths[name]):
            raise ValueError(
                f"{name} has {len(worths[name])} worths and {len(costs.get(name, ()))} costs; wanted one of each for"
                " every level"
            )
    least = sum(min(costs[name]) for name in worths)
    if least > limit:
        raise InfeasibleBudget(f"the cheapest levels cost {least:.6g}, more than {limit:.6g}; raise keep")
    bound = limit
    for _ in range(8):  # the solver may pass a bound by its tolerance
        chosen = _solved(worths, costs, max(bound, least))
        spent = sum(costs[name][level] for name, level in chosen.items())
        if spent <= limit:
            return chosen
        bound -= 2 * (spent - limit)
    return {name: min(range(len(costs[name])), key=lambda i, name=name: costs[name][i]) for name in worths}


def _solved(
    worths: Mapping[str, Sequence[float]], costs: Mapping[str, Sequence[float]], limit: float
) -> dict[str, int]:
    """The levels by integer programming. Raises ValueError if the solver has no answer."""
    if not worths:
        return {}
    # relative to the least cost of each module: what is shared out is what is left above it
    floors = {name: min(costs[name]) for name in worths}
    left = limit - sum(floors.values())
    value = np.concatenate([np.asarray(worths[name], dtype=float) for name in worths])
    price = np.concatenate([np.asarray(costs[name], dtype=float) - floors[name] for name in worths])
    module = np.concatenate([np.full(len(worths[name]), row) for row, name in enumerate(worths)])
    n, size = len(worths), len(value)
    scale = max(left, float(price.max()) * 1e-9, 1e-300)
    once = csr_array((np.ones(size), (module, np.arange(size))), shape=(n, size))
    answer = milp(
        -value / max(float(np.abs(value).max()), 1e-300),
        constraints=[
            LinearConstraint(once, lb=1, ub=1),  # pyright: ignore[reportArgumentType]
            LinearConstraint(csr_array((price / scale)[None]), ub=left / scale),  # pyright: ignore[reportArgumentType]
        ],
        bounds=Bounds(0, 1),
        integrality=np.ones(size),
        options={"mip_rel_gap": GAP, "time_limit": SECONDS},
    )
    if answer.x is None or answer.status != 0:
        raise ValueError(
            f"the choice among {size:,} levels was not solved in {SECONDS:.0f} s ({answer.message}); give fewer levels"
        )
    first = np.searchsorted(module, np.arange(n))
    ends = [*first[1:], size]
    return {name: int(np.argmax(answer.x[start:end])) for name, start, end in zip(worths, first, ends, strict=True)}
