"""What masks a search may draw, and what a regression can learn from them.

The law is the rank of the centred design: with as many pairs as columns every unit's worth can be told from the
others', under the independent sampler; under the published one a column per module is lost, and with it the order of
units of different modules.
"""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from compresso.core.axis import Axis, Kind
from compresso.core.regression import ridge
from compresso.core.subsets import Pool, drawn, independent, perturbable, published, published_pool, told_apart


def priors(modules: int, size: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layers.{i}.heads": torch.rand(size, generator=generator) for i in range(modules)}


def shares(of: Mapping[str, Tensor], p: float = 0.05) -> dict[str, float]:
    return dict.fromkeys(of, p)


def rank(masks: Tensor) -> int:
    x = masks.double()
    return int(torch.linalg.matrix_rank(x - x.mean(dim=0)))


def additive(pool: Pool, masks: Tensor, worth: Mapping[str, Tensor]) -> Tensor:
    """A score that is the sum of what the units that are on are worth."""
    return torch.stack(
        [sum((pool.masks(row)[name].double() @ worth[name] for name in worth), torch.tensor(0.0)) for row in masks]
    )


@pytest.mark.parametrize(
    ("size", "p", "fewest", "u"),
    [
        (32, 0.05, 1, 4),
        (200, 0.05, 1, 20),
        (11008, 0.05, 1, 1101),
        (3, 0.05, 1, 2),
        (1, 0.05, 1, 0),
        (30, 0.1, 1, 6),
        (3, 0.05, 0, 3),
        (9, 0.05, 7, 2),
    ],
)
def test_how_many_units_of_a_module_may_be_off(size: int, p: float, fewest: int, u: int) -> None:
    given = {"wide": torch.rand(5), **priors(1, size)}
    pool = perturbable(given, shares(given, p), fewest={"layers.0.heads": fewest})
    units = pool.units["layers.0.heads"]
    assert len(units) == u
    assert len(pool) == u + 4
    assert units.tolist() == sorted(given["layers.0.heads"].argsort()[:u].tolist())


def test_no_unit_that_may_be_off_is_an_error_and_so_is_a_prior_that_is_not_finite() -> None:
    with pytest.raises(ValueError, match="none of 2 modules has a unit that may be off"):
        perturbable(priors(2, 1), shares(priors(2, 1)))
    with pytest.raises(ValueError, match=r"the prior of layers\.0\.heads holds NaN"):
        perturbable({"layers.0.heads": torch.tensor([1.0, float("nan")])}, {"layers.0.heads": 0.1})
    pool = perturbable(priors(2, 4), shares(priors(2, 4)))
    for draw in (lambda: independent(pool, 0, 0), lambda: published(pool, priors(2, 4), shares(priors(2, 4)), 0, 0)):
        with pytest.raises(ValueError, match="0 pairs"):
            draw()


def test_columns_come_back_to_their_units() -> None:
    pool = Pool(
        {"a": torch.tensor([0, 2]), "b": torch.tensor([], dtype=torch.long), "c": torch.tensor([1])},
        {"a": 3, "b": 1, "c": 2},
    )
    found = pool.scatter(torch.tensor([1.5, 2.5, 3.5]), float("inf"))
    assert {name: values.tolist() for name, values in found.items()} == {
        "a": [1.5, torch.inf, 2.5],
        "b": [torch.inf],
        "c": [torch.inf, 3.5],
    }
    masks = pool.masks(torch.tensor([False, True, False]))
    assert {name: mask.tolist() for name, mask in masks.items()} == {"a": [0, 1, 1], "b": [1], "c": [1, 0]}
    assert masks["a"].dtype == torch.float32


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    ("modules", "size", "pairs"), [(1, 3, 3), (1, 5, 5), (2, 3, 4), (10, 3, 21), (10, 3, 12), (8, 32, 20)]
)
def test_independent_pairs_say_as_much_as_pairs_can(modules: int, size: int, pairs: int, seed: int) -> None:
    """Full column rank with as many pairs as columns, so also with one mask more than columns before complements:
    always.
    """
    given = priors(modules, size, seed)
    pool = perturbable(given, shares(given))
    assert rank(independent(pool, pairs, seed)) == min(pairs, len(pool))


def test_each_independent_mask_is_followed_by_its_complement_and_leaves_fixed_units_and_modules_on() -> None:
    given = priors(6, 5)
    pool = perturbable(given, shares(given))
    masks = independent(pool, 40, 0)
    assert masks.shape == (80, 24)
    assert (masks[::2] ^ masks[1::2]).all()
    for row in masks:
        for name, mask in pool.masks(row).items():
            assert mask.any()
            fixed = torch.ones(5, dtype=torch.bool).index_fill(0, pool.units[name], False)
            assert (mask[fixed] == 1).all()
    alone = masks[::2].double()
    assert abs(float(alone.mean()) - 0.5) < 0.05
    together = torch.corrcoef(alone.T) - torch.eye(24)
    assert float(together.mean().abs()) < 0.02  # columns of a module are not tied to each other


def test_a_seed_fixes_the_masks_of_both_samplers() -> None:
    given = priors(4, 40)
    pool, theirs = perturbable(given, shares(given)), published_pool(given, shares(given))
    for draw in (
        lambda seed: independent(pool, 9, seed),
        lambda seed: published(theirs, given, shares(given), 9, seed),
    ):
        assert torch.equal(draw(1), draw(1))
        assert not torch.equal(draw(1), draw(2))


def test_published_masks_switch_the_same_number_off_in_every_module_and_rarely_those_of_a_high_prior() -> None:
    given = priors(3, 100)
    pool = published_pool(given, shares(given))
    masks = published(pool, given, shares(given), 2000, 0)
    assert [len(units) for units in pool.units.values()] == [10, 10, 10]
    assert (masks[::2] ^ masks[1::2]).all()
    assert (masks[::2].reshape(-1, 3, 10).sum(dim=2) == 10 - 6).all()
    prior = given["layers.0.heads"]
    off = pool.units["layers.0.heads"][prior[pool.units["layers.0.heads"]].argsort()]
    often = {
        unit: float((~masks[::2, i]).double().mean()) for i, unit in enumerate(pool.units["layers.0.heads"].tolist())
    }
    assert often[int(off[0])] > often[int(off[-1])] + 0.02


def test_published_masks_lose_a_rank_a_module() -> None:
    """The additions' table: 24 of 32 columns for 32 heads, 8 of 16 for 12, in 8 modules."""
    for size, columns, wanted in ((32, 32, 24), (12, 16, 8)):
        given = priors(8, size)
        pool = published_pool(given, shares(given))
        assert len(pool) == columns
        assert rank(published(pool, given, shares(given), 60, 0)) == wanted


@pytest.mark.parametrize("size", [3, 8, 9, 20])
def test_the_published_sampler_is_refused_where_a_module_has_only_one_mask(size: int) -> None:
    """One unit that varies, or (20 units) two, both of which every mask switches off."""
    given = {"layers.0.channels": torch.rand(200), **priors(10, size)}
    with pytest.raises(ValueError, match=rf"layers\.0\.heads's {size} units .* take the sampler 'independent'"):
        published_pool(given, shares(given))


def test_units_are_told_apart_where_masks_of_the_published_sampler_differ() -> None:
    for size in range(1, 60):
        given = {"a": torch.rand(size)}
        if told_apart(size, 0.05):
            masks = published(published_pool(given, {"a": 0.05}), given, {"a": 0.05}, 50, 0)[::2]
            assert len(masks.unique(dim=0)) > 1
        else:
            with pytest.raises(ValueError, match="nothing is learned of it"):
                published_pool(given, {"a": 0.05})


def test_a_module_that_grew_too_small_is_not_varied_by_the_published_sampler() -> None:
    given = {"layers.0.heads": torch.rand(3), "layers.0.channels": torch.rand(100)}
    pool, masks = drawn("published", given, 0.05, 20, 0, {})
    assert {name: len(units) for name, units in pool.units.items()} == {"layers.0.heads": 0, "layers.0.channels": 10}
    assert masks.shape == (40, len(pool))
    assert pool.scatter(torch.zeros(10), 1.0)["layers.0.heads"].tolist() == [1, 1, 1]
    small = {"layers.0.heads": torch.rand(3)}
    with pytest.raises(ValueError, match="take the sampler 'independent'"):
        drawn("published", small, 0.05, 20, 0, {})
    pool, masks = drawn("independent", given, 0.05, 20, 0, {"layers.0.heads": 2})
    assert [len(units) for units in pool.units.values()] == [1, 10]
    assert torch.equal(masks, independent(pool, 20, 0))


def test_equal_priors_can_be_drawn_from() -> None:
    given = {"a": torch.ones(100)}
    masks = published(published_pool(given, {"a": 0.05}), given, {"a": 0.05}, 5, 0)
    assert (masks[::2].sum(dim=1) == 4).all()


def worst_found(draw: str, modules: int, size: int, seed: int) -> bool:
    """Whether ridge gives the least coefficient to the unit that an additive score needs least, among those that may be
    off.
    """
    given = priors(modules, size, seed)
    generator = torch.Generator().manual_seed(seed + 1000)
    worth = {name: 1 + torch.rand(size, generator=generator, dtype=torch.float64) for name in given}
    pool = perturbable(given, shares(given)) if draw == "independent" else published_pool(given, shares(given))
    target = list(given)[int(torch.randint(modules, (1,), generator=generator))]
    worth[target][pool.units[target]] = torch.linspace(0.5, 0.6, len(pool.units[target]), dtype=torch.float64)
    pairs = 50  # more than columns
    masks = (
        independent(pool, pairs, seed) if draw == "independent" else published(pool, given, shares(given), pairs, seed)
    )
    least = pool.scatter(ridge(masks, additive(pool, masks, worth), together=2).coefficients, float("inf"))
    found = min(least, key=lambda name: float(least[name].min()))
    return found == target and int(least[target].argmin()) == int(pool.units[target][0])


def test_the_planted_worst_group_of_ten_modules_of_three_is_found() -> None:
    assert all(worst_found("independent", 10, 3, seed) for seed in range(20))


@pytest.mark.slow
def test_published_masks_find_the_planted_worst_unit_by_chance_only() -> None:
    """12 units a module, two of which vary: a module that hardly matters looks like any other, since its columns add up
    to a constant.
    """
    assert all(worst_found("independent", 10, 12, seed) for seed in range(20))
    assert sum(worst_found("published", 10, 12, seed) for seed in range(20)) <= 3


def test_draws_below_an_exclusive_floor_may_take_whole_modules() -> None:
    given = priors(2, 3)
    pool = perturbable(given, shares(given), fewest=dict.fromkeys(given, 0))
    masks = independent(pool, 60, 0)
    assert any(not pool.masks(row)["layers.0.heads"].any() for row in masks)


def test_a_unit_within_one_that_is_off_is_off() -> None:
    pool = Pool({"heads": torch.tensor([0, 2]), "of 0": torch.tensor([1]), "of 1": torch.tensor([0, 1])}, {})
    x = torch.tensor([[0, 0, 1, 1, 0], [1, 0, 1, 0, 1]], dtype=torch.bool)
    heads = Axis("heads", Kind.HEAD, 3, (), (), "")
    inside = [Axis(f"of {g}", Kind.QUERY, 2, (), (), "", within=("heads", g)) for g in range(2)]  # 1 is always on
    assert pool.on(x, [heads, *inside]).int().tolist() == [[0, 0, 0, 1, 0], [1, 0, 1, 0, 1]]
    assert torch.equal(pool.on(x, [heads]), x)
