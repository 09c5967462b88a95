"""Sub-models that a forward-only search tries: which units may be off, and masks of several modules' units drawn at
once.

Bonsai (arXiv 2402.05406) perturbs, in each module, the units that a prior thinks least of, and follows every mask by
its complement, so that each unit is as often on as off and interactions of two units cancel in what a unit seems worth.
Two ways to draw:

    independent     each unit off with probability 1/2, whatever the others are: a coefficient for every unit can be
                    distinguished from the rest
    published       a fixed number of units off in every module. Then the columns of a module add up to a constant, and
                    coefficients of
                    different modules do not compare; with one unit a module, all of its masks are the same.

Unusual: an independent mask that says nothing new is drawn again, so that P pairs have a centred design of rank min(P,
columns) always, not just likely. (A mask and its complement lie opposite each other around the mean, so a pair adds one
to the rank, not two.)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compresso.core.axis import Axis

LEAST = 4
"""Units of a module that may be off, if it has more than these: of fewer, too little is learned in a round."""


Sampler = Literal["independent", "published"]


@dataclass(frozen=True)
class Pool:
    """Units that may be off, module after module: the columns of masks.

    Args:
        units: module -> its units that may be off [u], int64, ascending. Modules without any are named, too.
        sizes: module -> how many units it has.
    """

    units: Mapping[str, Tensor]
    sizes: Mapping[str, int]

    def __len__(self) -> int:
        """The number of columns."""
        return sum(len(units) for units in self.units.values())

    def scatter(self, values: Tensor, elsewhere: float) -> dict[str, Tensor]:
        """Values of the columns [columns] at their modules' units: module -> [size] of the same dtype, `elsewhere` for
        other units.
        """
        parts = torch.split(values, [len(units) for units in self.units.values()])
        values_of: dict[str, Tensor] = {}
        for (name, units), part in zip(self.units.items(), parts, strict=True):
            values_of[name] = torch.full((self.sizes[name],), elsewhere, dtype=values.dtype, device=values.device)
            values_of[name][units] = part
        return values_of

    def on(self, x: Tensor, axes: Sequence[Axis]) -> Tensor:
        """Masks [masks, columns], bool, in which a unit within another is on only where that one is: what a sub-model
        has of it.

        axes: the modules, those that lie within others among them.
        """
        around = {axis.name: axis.within for axis in axes if axis.within is not None}
        places = [(name, int(unit)) for name, units in self.units.items() for unit in units]
        column = {place: i for i, place in enumerate(places)}
        outer = [column.get(around.get(place[0], place), i) for i, place in enumerate(places)]
        return x & x[:, torch.tensor(outer, dtype=torch.int64)]

    def masks(self, row: Tensor) -> dict[str, Tensor]:
        """One row of a design [columns] as masks: module -> [size], float32, 1 for units that are on."""
        return self.scatter(row.float(), 1.0)


def perturbable(
    priors: Mapping[str, Tensor],
    shares: Mapping[str, float],
    *,
    least: int = LEAST,
    fewest: Mapping[str, int] | None = None,
) -> Pool:
    """In each module of n units the max(ceil(2 p n), least) lowest by prior; of equal ones the first.

    Args:
        priors: module -> [n], finite; higher for units that are thought to matter.
        shares: module -> p, the share of units that a round removes.
        least: see `LEAST`.
        fewest: module -> units that are on in every mask, at least 1 unless given: no mask switches a whole module off
            but where 0 is.

    Raises:
        ValueError: a prior is not finite, or no module has a unit that may be off.
    """
    units: dict[str, Tensor] = {}
    for name, prior in priors.items():
        n = len(prior)
        wanted = max(math.ceil(2 * shares[name] * n - 1e-9), least)
        units[name] = _lowest(name, prior, max(min(n - (fewest or {}).get(name, 1), wanted), 0))
    pool = Pool(units, {name: len(prior) for name, prior in priors.items()})
    if not len(pool):
        raise ValueError(
            f"none of {len(priors)} modules has a unit that may be off; lower floor, or name kinds with more units"
        )
    return pool


def independent(pool: Pool, pairs: int, seed: int) -> Tensor:
    """Masks [2 pairs, columns], bool, True for on: each unit off with probability 1/2, every mask followed by its
    complement.

    Their centred design has rank min(pairs, columns).

    Raises:
        ValueError: unless pairs >= 1.
    """
    _check_pairs(pairs)
    columns, generator = len(pool), torch.Generator().manual_seed(seed)
    basis = torch.zeros(min(pairs, columns), columns, dtype=torch.float64)
    rows: list[Tensor] = []
    while len(rows) < pairs:
        row = torch.randint(2, (columns,), generator=generator, dtype=torch.bool)
        if len(rows) < len(basis):
            new = 2 * row.double() - 1
            for _ in range(2):  # once more: rounding of the first time
                new -= basis.T @ (basis @ new)
            norm = float(new.square().sum().sqrt())
            if norm < 1e-6 * math.sqrt(columns):
                continue
            basis[len(rows)] = new / norm
        rows.append(row)
    return with_complements(torch.stack(rows))


def drawn(
    sampler: Sampler, priors: Mapping[str, Tensor], share: float, pairs: int, seed: int, fewest: Mapping[str, int]
) -> tuple[Pool, Tensor]:
    """A round's units that may be off, and its masks [2 pairs, columns], bool.

    Modules that have grown too small for the published sampler are not varied.

    Args:
        sampler: "independent" or "published".
        priors: module -> [n], finite; higher for units that are thought to matter.
        share: of the units, that a round removes.
        pairs: masks that are drawn; as many are their complements.
        seed: of the draws.
        fewest: module -> units that stay on in every independent mask.

    Raises ValueError if there is nothing to vary.
    """
    shares = dict.fromkeys(priors, share)
    if sampler == "independent":
        pool = perturbable(priors, shares, fewest=fewest)
        return pool, independent(pool, pairs, seed)
    large = {name: prior for name, prior in priors.items() if told_apart(len(prior), share)}
    if not large:
        raise ValueError(
            f"none of {len(priors)} modules has units enough for the published sampler; take the sampler 'independent'"
        )
    pool = published_pool(large, shares)
    none = {name: torch.zeros(0, dtype=torch.int64) for name in priors if name not in large}
    everywhere = Pool({**pool.units, **none}, {name: len(prior) for name, prior in priors.items()})
    return everywhere, published(pool, large, shares, pairs, seed)


def told_apart(size: int, share: float) -> bool:
    """Whether masks of the published sampler differ in a module of `size` units: they do not where it varies one unit,
    or as many as every mask switches off (int(p n) + 1).
    """
    u = _n_varied(size, share)
    return u >= 2 and _n_off(size, share) < u


def published_pool(priors: Mapping[str, Tensor], shares: Mapping[str, float]) -> Pool:
    """In each module of n units all but the best int(n (1 - 2 p)) by prior, as Bonsai's code takes them.

    Raises:
        ValueError: a module's masks would all be alike (see `told_apart`); no regression could tell it from other
            modules.
    """
    units: dict[str, Tensor] = {}
    for name, prior in priors.items():
        n = len(prior)
        u, off = _n_varied(n, shares[name]), _n_off(n, shares[name])
        if not told_apart(n, shares[name]):
            raise ValueError(
                f"the published sampler would vary {u} of {name}'s {n} units and switch {off} off in every mask, so"
                " that all of its masks are the same and nothing is learned of it; take the sampler 'independent'"
            )
        units[name] = _lowest(name, prior, u)
    return Pool(units, {name: len(prior) for name, prior in priors.items()})


def published(pool: Pool, priors: Mapping[str, Tensor], shares: Mapping[str, float], pairs: int, seed: int) -> Tensor:
    """Masks [2 pairs, columns], bool, True for on: int(p n) + 1 units of each module off, every mask followed by its
    complement.

    A unit's chance falls with its prior: it is proportional to the module's highest prior less its own. pool: as
    `published_pool` makes it.

    Raises:
        ValueError: unless pairs >= 1.
    """
    _check_pairs(pairs)
    generator, parts = torch.Generator().manual_seed(seed), list[Tensor]()
    for name, units in pool.units.items():
        prior = priors[name].detach().cpu().double()
        chances = prior.max() - prior[units]
        chances = (chances / chances.max()).clamp(min=1e-9) if chances.max() > 0 else torch.ones_like(chances)
        off = torch.multinomial(chances.expand(pairs, -1), _n_off(len(prior), shares[name]), generator=generator)
        parts.append(torch.ones(pairs, len(units), dtype=torch.bool).scatter_(1, off, False))
    return with_complements(torch.cat(parts, dim=1))


def with_complements(masks: Tensor) -> Tensor:
    """Masks [n, columns], bool, each followed by its complement: [2 n, columns]."""
    return torch.stack([masks, ~masks], dim=1).flatten(0, 1)


def _n_varied(size: int, share: float) -> int:
    """How many units of a module published masks vary."""
    return size - int(size * (1 - 2 * share))


def _n_off(size: int, share: float) -> int:
    """How many units of a module a published mask switches off."""
    return int(share * size) + 1


def _lowest(name: str, prior: Tensor, n: int) -> Tensor:
    """The n units of the lowest prior, ascending. Raises ValueError for a prior that is not finite."""
    if not bool(prior.isfinite().all()):
        raise ValueError(
            f"the prior of {name} holds NaN or infinity; wanted finite numbers, higher for units that matter more"
        )
    return prior.detach().cpu().argsort(stable=True)[:n].sort().values


def _check_pairs(pairs: int) -> None:
    if pairs < 1:
        raise ValueError(f"{pairs} pairs of masks; wanted at least 1")
