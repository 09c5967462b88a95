"""Where ristretto begins: widths by gradients follow the scores, are judged beside others, or are said not to fit."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from compresso.core.axis import Axis
from compresso.core.budget import InfeasibleBudget
from compresso.methods import ristretto_beginnings
from compresso.methods.ristretto_beginnings import Beginnings
from compresso.solve.bank_choice import menu
from compresso.solve.level_choice import Levels
from tests.methods.conftest import MakeJob
from tests.methods.test_ristretto import ristretto
from tests.solve.test_bank_choice import ALL, made_up, priced


def test_widths_by_gradients_are_judged_beside_the_others(make_job: MakeJob) -> None:
    stage = ristretto(search="dp", keep=0.6, by_gradients=1)
    told = stage(make_job(folder="whole")).records["ristretto"]
    alone = ristretto(search="dp", keep=0.6)(make_job(folder="alone")).records["ristretto"]
    (n,) = told["by_gradients"]
    assert [one for i, one in enumerate(told["judged"]) if i != n] == alone["judged"][: len(told["judged"]) - 1]
    assert not told["judged"][n]["gone"]
    assert told["judged"][told["taken"]]["divergence"] == min(one["divergence"] for one in told["judged"])


def test_widths_by_gradients_with_some_layers_gone_are_judged_too(make_job: MakeJob) -> None:
    told = ristretto(search="dp", keep=0.34, by_gradients=2)(make_job(folder="gone")).records["ristretto"]
    most = max(len(one["gone"]) for one in told["judged"])
    first, second = told["by_gradients"]
    assert most == 2 and not told["judged"][first]["gone"] and len(told["judged"][second]["gone"]) == 1
    assert told["judged"][second]["gone"][0] in max((one["gone"] for one in told["judged"]), key=len)
    assert told["parameters_after"]["blocks"] <= 0.34 * told["parameters_before"]["blocks"]


def test_layers_that_are_enough_alone_leave_no_widths_to_choose(
    make_job: MakeJob, caplog: pytest.LogCaptureFixture
) -> None:
    stage, job = ristretto(search="dp", keep=0.6), make_job()
    first = Beginnings(job, stage.calibrates, menu(made_up(3), ("head",)), [], 0.0, {})
    assert first.by_gradients(0.9, "blocks", ("head",), [1]) is None
    assert "no beginning by gradients with 1 layer gone: nothing else has to leave" in caplog.text


@pytest.mark.parametrize(("most", "wanted"), [(1, [0]), (2, [0, 1]), (3, [0, 1]), (9, [0, 1])])
def test_layers_gone_by_gradients_stop_short_of_as_many_as_are_enough(
    make_job: MakeJob, caplog: pytest.LogCaptureFixture, most: int, wanted: list[int]
) -> None:
    choice = menu(made_up(3), ALL)
    first = Beginnings(make_job(), ristretto().calibrates, choice, priced(choice), -600.0, {})  # of 900: two layers
    assert first.few_gone([2, 0, 1], most) == wanted
    assert ("2 layers gone would be enough alone" in caplog.text) == (len(wanted) < most)
    assert first.few_gone([], 2) == [0] and "since no layer may leave" in caplog.text


def test_widths_by_gradients_that_do_not_fit_are_said_and_left_out(
    make_job: MakeJob, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> Levels:
        raise InfeasibleBudget("no widths")

    monkeypatch.setattr(ristretto_beginnings, "near", none)
    job = ristretto(search="dp", keep=0.6, by_gradients=1)(make_job())
    assert "by_gradients" not in job.records["ristretto"]
    assert "no beginning by gradients" in caplog.text


@pytest.mark.parametrize(
    "knobs", [{"search": "none"}, {"layout": "uniform", "search": "dp"}, {"kinds": ("attention", "mlp")}]
)
def test_widths_by_gradients_are_refused_where_there_are_none(knobs: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="by_gradients=1 gives"):
        ristretto(by_gradients=1, **knobs)
    assert ristretto(by_gradients=1).needs_more() == ("gradients",) and ristretto().needs_more() == ()


def test_widths_follow_what_the_loss_minds(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """The channels of one layer are minded most, those of another not at all."""
    asked: list[Mapping[str, int]] = []

    def scores(model: Any, axes: Sequence[Axis], *_: Any) -> dict[str, Tensor]:
        worth = {"layers.0.channels": 1e3, "layers.1.channels": 1e-3}
        return {axis.name: torch.linspace(1, 2, axis.size) * worth.get(axis.name, 1.0) for axis in axes}

    def seen(choice: Any, priced: Any, limit: float, kept: Mapping[str, int], gone: Sequence[int]) -> Levels:
        asked.append(kept)
        return near(choice, priced, limit, kept, gone)

    near = ristretto_beginnings.near
    monkeypatch.setattr(ristretto_beginnings, "sensitivity_per_cost", scores)
    monkeypatch.setattr(ristretto_beginnings, "near", seen)
    job = make_job()
    sizes = {axis.name: axis.size for axis in job.arch.axes(job.model)}
    ristretto(search="dp", keep=0.7, by_gradients=1)(job)
    (kept,) = asked
    left = {name: kept.get(name, sizes[name]) for name in ("layers.0.channels", "layers.1.channels")}
    assert left["layers.0.channels"] == sizes["layers.0.channels"]
    assert left["layers.1.channels"] < sizes["layers.1.channels"] / 2
