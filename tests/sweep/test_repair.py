"""The repair of a smaller model against least squares on what plain forward passes of both models show, in every
architecture; and what it must leave alone.
"""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.arch.conftest import CONFIGS, MIXTURES, POST_NORM, WITH_HIDDEN
from tests.arch.conftest import tiny as tiny
from tests.arch.test_laws import Tiny, described, random_masks
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso.core.axis import Axis, Kind
from compresso.core.plan import Plan
from compresso.core.repair import token_weights
from compresso.edit.shrink import shrink_
from compresso.errors import NumericError
from compresso.sweep import repair_targets, two_streams
from compresso.sweep.activation_store import Place as Where
from compresso.sweep.journal import Journal
from compresso.sweep.least_squares import Fit
from compresso.sweep.lost import Lost, Place, Refit, lost, writers
from compresso.sweep.repair import Calibrated, repair_
from compresso.sweep.targets import matrix
from compresso.sweep.two_streams import Known

TEXT = [name for name in CONFIGS if not name.startswith("vit") and name not in MIXTURES]
"""Families that a repair takes: mixtures of experts it refuses."""
BEHIND_A_NORM = [*POST_NORM, "gemma2", "gemma3", "glm4_tied"]
IDS = torch.randint(2, 128, (10, 24), generator=torch.Generator().manual_seed(3))
OTHERS = torch.randint(2, 128, (4, 24), generator=torch.Generator().manual_seed(4))
ONE = Fit(alphas=(1.0,), ridges=(0.3,))


@dataclass
class Seen:
    """What plain forward passes show of a model."""

    before: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    behind: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    read: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    wrote: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


def seen_of(model: PreTrainedModel, ids: Tensor = IDS) -> Seen:
    arch, _ = described(model)
    seen = Seen()

    def first(value: Any) -> Tensor:
        return (value[0] if isinstance(value, tuple) else value).detach().double()

    def of_block(layer: int) -> Any:
        def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            seen.before[layer] = first(given[0] if given else named["hidden_states"])
            seen.behind[layer] = first(output)

        return hook

    def of_linear(name: str) -> Any:
        def hook(_: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            seen.read[name] = first(given[0])
            seen.wrote[name] = first(output).reshape(*ids.shape, -1)  # OPT's FFN sees tokens without rows

        return hook

    handles = [block.register_forward_hook(of_block(i), with_kwargs=True) for i, block in enumerate(arch.blocks(model))]
    for name in writers(model, arch).values():
        handles.append(model.get_submodule(name).register_forward_hook(of_linear(name)))
    with torch.no_grad():
        model.base_model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def falling() -> Callable[[], float]:
    """A loss that any repair lowers: gaps are then closed with the last ridge that is tried."""
    times = itertools.count()
    return lambda: -float(next(times))


@dataclass(frozen=True)
class Pair:
    """A dense model and what was made of it."""

    dense: PreTrainedModel
    smaller: PreTrainedModel
    layers: Sequence[int]
    dimensions: Sequence[int] | None

    def gone(self, refit: Refit = Refit.GAPS) -> Lost:
        arch, _ = described(self.dense)
        return lost(self.dense, self.smaller, arch, self.layers, self.dimensions is not None, refit)

    def repaired(
        self,
        fit: Fit = ONE,
        folder: Path | None = None,
        *,
        seen: Sequence[Tensor] = (IDS,),
        held: Sequence[Tensor] = (IDS,),
        refit: Refit = Refit.GAPS,
        place: Where = "device",
        journal: Journal | None = None,
        loss: Callable[[], float] | None = None,
    ) -> tuple[PreTrainedModel, dict[str, dict[str, Any]]]:
        """A repaired copy; fitted to some text and, unless told otherwise, judged on the same."""
        model, (arch, _) = copy.deepcopy(self.smaller), described(self.dense)
        data = Calibrated(seen, held, place, folder or Path("unused"))
        notes = repair_(
            self.dense,
            model,
            arch,
            self.gone(refit),
            self.layers,
            self.dimensions,
            data,
            fit,
            loss or falling(),
            journal=journal,
        )
        return model, notes


def pair(dense: PreTrainedModel, masks: Mapping[str, Tensor]) -> Pair:
    smaller = copy.deepcopy(dense)
    _, axes = described(smaller)
    plan = Plan.from_masks(axes, masks)
    shrink_(smaller, axes, plan)
    arch, _ = described(dense)
    layers = plan.kept.get("layers", tuple(range(len(arch.blocks(dense)))))
    return Pair(dense, smaller, layers, plan.kept.get("hidden"))


def without(axes: Sequence[Axis], gone: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Masks without some units, by axis name or kind."""
    masks: dict[str, Tensor] = {}
    for axis in axes:
        for name, units in gone.items():
            if name in (axis.name, axis.kind):
                masks[axis.name] = torch.ones(axis.size)
                masks[axis.name][list(units)] = 0
    return masks


def least_squares(old: Tensor, inputs: Tensor, targets: Tensor, led_to: Tensor, ridge: float) -> Tensor:
    """The minimiser [out, in] by a solver of stacked equations; tokens weigh by the stream that they are led to, and
    those that draw attention more.
    """
    weights = token_weights(led_to, IDS.shape[1]).double()
    root = weights.sqrt().unsqueeze(1)
    pull = ridge * (weights.unsqueeze(1) * inputs.square()).sum(dim=0).mean().sqrt() ** 2
    left = torch.cat([root * inputs, pull.sqrt() * torch.eye(inputs.shape[1], dtype=torch.float64)])
    right = torch.cat([root * targets, pull.sqrt() * old.double().T])
    return torch.linalg.lstsq(left, right).solution.T


def cut(states: Tensor, dimensions: Sequence[int] | None) -> Tensor:
    return states if dimensions is None else states[..., list(dimensions)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["channel", "head", "layer", "together"])
@pytest.mark.parametrize("name", TEXT)
def test_every_weight_is_the_least_squares_fit_to_the_dense_stream(tiny: Tiny, name: str, kind: str) -> None:
    """Oracle: plain passes of the dense and of the repaired model. What a linear reads does not depend on itself."""
    dense = tiny(name)
    arch, axes = described(dense)
    both = pair(dense, random_masks(axes, kind, soft=False))
    repaired, notes = both.repaired()
    was, now, gone = seen_of(dense), seen_of(repaired), both.gone()
    names = writers(dense, arch)
    adds = name not in BEHIND_A_NORM
    assert {one.module for one in gone.consumers} == set(notes)
    assert gone.consumers or (kind == "head" or (kind == "layer" and name in POST_NORM))
    for one in gone.consumers:
        old = matrix(both.smaller, one.module)
        if not adds and not one.narrower:
            assert not notes[one.module]["applied"]
            assert torch.equal(matrix(repaired, one.module), old)
            continue
        if adds:
            until = one.until.layer
            goal = was.behind[until]
            if one.until.kind is Kind.ATTENTION:
                goal = was.before[until] + was.wrote[names[one.until]]
            already = now.before[one.layer]
            if one.place.kind is Kind.MLP:
                already = now.behind[one.layer] - now.wrote[one.module]
        else:
            goal, already = was.wrote[names[one.place]], torch.zeros(())
        bias = getattr(repaired.get_submodule(one.module), "bias", None)
        targets = cut(goal, both.dimensions) - already - (0 if bias is None else bias.detach().double())
        stream = cut(goal, both.dimensions).flatten(0, 1)
        wanted = least_squares(old, now.read[one.module].flatten(0, -2), targets.flatten(0, 1), stream, 0.3)
        assert notes[one.module]["applied"], one
        torch.testing.assert_close(matrix(repaired, one.module).double(), wanted, atol=2e-4, rtol=2e-3)
    meant = {f"{one.module}.weight" for one in gone.consumers}
    unchanged = dict(both.smaller.named_parameters())
    assert all(torch.equal(p, unchanged[n]) for n, p in repaired.named_parameters() if n not in meant)


@pytest.mark.parametrize("name", [name for name in TEXT if name not in POST_NORM])
def test_channels_that_others_stand_in_for_are_missed_by_nobody(tiny: Tiny, name: str) -> None:
    """Half of the channels compute what the other half computes: their columns are added, whichever target is taken."""
    dense = tiny(name)
    _, axes = described(dense)
    channels = next(axis for axis in axes if axis.name == "layers.1.channels")
    half = channels.size // 2
    down = writers(dense, described(dense)[0])[Place(1, 1)]
    with torch.no_grad():
        for piece in channels.slices:
            if not piece.param.startswith(down):
                entries = dense.get_parameter(piece.param).movedim(piece.dim, 0)
                entries[piece.start + half : piece.start + 2 * half] = entries[piece.start : piece.start + half]
    both = pair(dense, without(axes, {channels.name: range(half, 2 * half)}))
    for residual in (True, False):
        repaired, notes = both.repaired(Fit(residual, (1.0,), (1e-7,)))
        assert list(notes) == [down]
        with torch.no_grad():
            wanted, was, found = (one(input_ids=OTHERS)[0] for one in (dense, both.smaller, repaired))
        assert (found - wanted).norm() < 0.05 * (was - wanted).norm()


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "phi", "gpt_neox"])
def test_before_the_first_gap_both_targets_are_one(tiny: Tiny, name: str) -> None:
    """The smaller model's stream is still the dense one there."""
    dense = tiny(name)
    both = pair(dense, without(described(dense)[1], {"layers": [1, 2]}))
    fits = [Fit(residual, (alpha,), (0.3,)) for residual, alpha in ((True, 1.0), (False, 0.0), (True, 0.0))]
    first, *others = (both.repaired(fit) for fit in fits)
    (module,) = first[1]
    assert first[1][module]["absorbs"] == "1.attention to 2.mlp"
    for model, _ in others:
        torch.testing.assert_close(matrix(model, module), matrix(first[0], module), atol=1e-5, rtol=1e-4)


def test_behind_a_repaired_layer_the_targets_differ_and_mix(tiny: Tiny) -> None:
    dense = tiny("llama_gqa")
    both = pair(dense, without(described(dense)[1], {Kind.CHANNEL: range(0, 176, 3)}))
    modules = [one.module for one in both.gone().consumers]
    ends = [both.repaired(Fit(alphas=(alpha,), ridges=(0.3,)))[0] for alpha in (0.0, 1.0)]
    torch.testing.assert_close(*(matrix(one, modules[0]) for one in ends), atol=1e-5, rtol=1e-4)
    behind = [matrix(one, modules[2]) for one in ends]
    assert not torch.allclose(behind[0], behind[1], atol=1e-2)
    told = both.repaired(Fit())[1]
    assert {facts["alpha"] for facts in told.values()} <= {0.0, 0.5, 1.0}
    assert {facts["ridge"] for facts in told.values()} <= {0.03, 0.3, 3.0}


def test_only_what_feeds_a_gap_is_fitted_and_all_behind_it_where_asked(tiny: Tiny) -> None:
    dense = tiny("llama_gqa")
    _, axes = described(dense)
    both = pair(dense, without(axes, {"layers": [2]}))
    assert [(one.place, one.until) for one in both.gone().consumers] == [(Place(1, 1), Place(2, 1))]
    assert [one.place for one in both.gone(Refit.BEHIND).consumers] == [Place(1, 1), Place(3, 0), Place(3, 1)]
    mlp = pair(dense, without(axes, {"mlp": [1]}))
    assert [(one.place, one.until) for one in mlp.gone().consumers] == [(Place(1, 0), Place(1, 1))]
    attention = pair(dense, without(axes, {"attention": [2], "mlp": [1]}))
    assert [(one.place, one.until) for one in attention.gone().consumers] == [(Place(1, 0), Place(2, 0))]
    first = pair(dense, without(axes, {"layers": [0]})).gone()
    assert (first.consumers, first.unabsorbed) == ((), (Place(0, 0), Place(0, 1)))
    hidden = pair(dense, without(axes, {"hidden": range(8)})).gone()
    assert len(hidden.consumers) == 8
    mixed = pair(dense, without(axes, {"layers": [2], "layers.0.channels": [3]}))
    assert [one.place for one in mixed.gone().consumers] == [Place(0, 1), Place(1, 1)]
    assert [one.place for one in mixed.gone(Refit.BEFORE).consumers] == [Place(1, 1)]


def test_a_whole_model_is_left_alone(tiny: Tiny) -> None:
    dense = tiny("llama_gqa")
    both = pair(dense, {})
    assert both.gone() == Lost((), ())
    assert both.repaired()[1] == {}


def test_a_fit_that_misses_unseen_text_more_is_not_taken(tiny: Tiny) -> None:
    """A few tokens that say nothing of the others, and hardly a ridge: the old weight stays."""
    dense = tiny("llama_gqa")
    both = pair(dense, without(described(dense)[1], {"layers.1.channels": [5]}))
    few = [IDS[:1, :6]]
    repaired, notes = both.repaired(Fit(alphas=(1.0,), ridges=(1e-5,)), seen=few, held=[OTHERS])
    (module,) = notes
    assert not notes[module]["applied"]
    assert notes[module]["held_out_error"][1] == notes[module]["held_out_error"][0]
    assert torch.equal(matrix(repaired, module), matrix(both.smaller, module))
    chosen = both.repaired(Fit(alphas=(1.0,), ridges=(1e-5, 3.0)), seen=[IDS], held=[OTHERS])[1][module]
    assert chosen["applied"] and chosen["ridge"] == 3.0
    assert chosen["held_out_error"][1] < chosen["held_out_error"][0]


@pytest.mark.parametrize("best", [0, 1, 2, 3])
def test_before_a_gap_the_loss_of_the_model_decides(tiny: Tiny, best: int) -> None:
    """The old weight is judged first, then each ridge; whichever has the lowest loss stays."""
    dense = tiny("llama_gqa")
    both = pair(dense, without(described(dense)[1], {"layers": [2]}))
    losses = [0.5 if i == best else 1.0 + i for i in range(4)]
    repaired, notes = both.repaired(Fit(), loss=iter(losses).__next__)
    ((module, facts),) = notes.items()
    assert facts["held_out_loss"] == [losses[0], 0.5]
    assert facts["applied"] == (best > 0)
    if best:
        assert facts["ridge"] == (0.03, 0.3, 3.0)[best - 1]
        (alone, _) = both.repaired(Fit(alphas=(facts["alpha"],), ridges=(facts["ridge"],)))
        assert torch.equal(matrix(repaired, module), matrix(alone, module))
    else:
        assert torch.equal(matrix(repaired, module), matrix(both.smaller, module))


def test_without_a_loss_the_fit_that_misses_least_closes_a_gap(tiny: Tiny) -> None:
    dense = tiny("llama_gqa")
    both = pair(dense, without(described(dense)[1], {"layers": [2]}))
    model, (arch, _) = copy.deepcopy(both.smaller), described(dense)
    gone, data = both.gone(), Calibrated([IDS], [IDS])
    notes = repair_(dense, model, arch, gone, both.layers, None, data, Fit(alphas=(1.0,)), None)
    ((_, facts),) = notes.items()
    assert facts["applied"] and facts["ridge"] == 0.03  # judged on what it is fitted to
    assert facts["held_out_error"][1] < facts["held_out_error"][0] and "held_out_loss" not in facts
    few = Calibrated([IDS[:1, :6]], [OTHERS])
    taken_back = repair_(dense, model, arch, gone, both.layers, None, few, Fit(alphas=(1.0,), ridges=(1e-5,)), None)
    assert not next(iter(taken_back.values()))["applied"]


def test_what_is_known_of_the_dense_model_is_not_computed_again(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two repairs that share it give the weights of repairs that do not, and the second runs no dense block, unless a
    gap ends amid one.
    """
    dense = tiny("llama_gqa")
    arch, axes = described(dense)
    known, data, ran = Known(), Calibrated([IDS[:4], IDS[4:]], [OTHERS]), list[nn.Module]()
    real = two_streams.output_of

    def noted(block: nn.Module, batch: two_streams.BlockBatch) -> Tensor:
        ran.append(block)
        return real(block, batch)

    monkeypatch.setattr(two_streams, "output_of", noted)
    for place, masks in enumerate(({"layers": [2]}, {"layers": [1]}, {"attention": [2], "mlp": [1]})):
        both, found = pair(dense, without(axes, masks)), list[PreTrainedModel]()
        for one in (None, known):
            model, before = copy.deepcopy(both.smaller), len(ran)
            repair_(dense, model, arch, both.gone(), both.layers, None, data, Fit(alphas=(1.0,)), None, known=one)
            found.append(model)
        assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in found), strict=True))
        own = set(map(id, arch.blocks(dense)))
        assert any(id(block) in own for block in ran[before:]) == (place != 1)
    small = Known(room=100)
    small.keep(0, 0, torch.zeros(20), two_streams.Written())
    small.keep(1, 0, torch.zeros(6), two_streams.Written())
    assert small.get(0, 0) is not None and small.get(1, 0) is None


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_where_states_are_kept_changes_nothing(tiny: Tiny, tmp_path: Path, place: Where) -> None:
    dense = tiny("llama_gqa")
    both = pair(dense, random_masks(described(dense)[1], "together", soft=False))
    batches = [IDS[:4], IDS[4:], OTHERS[:, :9]]
    here, there = (both.repaired(Fit(), tmp_path, seen=batches, held=[OTHERS], place=one) for one in ("device", place))
    assert here[1] == there[1]
    assert all(torch.equal(a, b) for a, b in zip(here[0].parameters(), there[0].parameters(), strict=True))
    assert not list(tmp_path.iterdir())


class StoppedError(Exception):
    """The run is killed."""


class Killed(Journal):
    """A journal whose process dies when so many blocks are written."""

    after = 0

    def write(self, layer: int, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        super().write(layer, weights, facts)
        Killed.after -= 1
        if Killed.after == 0:
            raise StoppedError


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_a_repair_killed_after_any_block_ends_in_the_same_weights(tiny: Tiny, tmp_path: Path, blocks: int) -> None:
    dense = tiny("llama_gqa")
    both = pair(dense, random_masks(described(dense)[1], Kind.CHANNEL, soft=False))
    whole, told = both.repaired(Fit(), journal=Journal(tmp_path / "whole", {"run": 1}))
    Killed.after = blocks
    with pytest.raises(StoppedError):
        both.repaired(Fit(), journal=Killed(tmp_path / "killed", {"run": 1}))
    again, retold = both.repaired(Fit(), journal=Journal(tmp_path / "killed", {"run": 1}))
    assert retold == told
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("which", ["dense", "smaller"])
def test_a_model_that_overflows_is_named(tiny: Tiny, which: str) -> None:
    dense = tiny("llama_gqa")
    both = pair(dense, without(described(dense)[1], {"layers": [2]}))
    with torch.no_grad():
        getattr(both, which).get_parameter("model.layers.0.mlp.up_proj.weight")[0] = float("inf")
    with pytest.raises(NumericError, match="layer 0 outputs NaN or Inf"):
        both.repaired()


@pytest.mark.slow
def test_every_family_with_a_hidden_axis_is_repaired_in_fewer_dimensions(tiny: Tiny) -> None:
    for name in WITH_HIDDEN:
        dense = tiny(name)
        both = pair(dense, without(described(dense)[1], {"hidden": range(0, 64, 4)}))
        repaired, notes = both.repaired(Fit(ridges=(0.3,)))
        assert len(notes) == 8
        with torch.no_grad():
            wanted, was, found = (one(input_ids=IDS)[0] for one in (dense, both.smaller, repaired))
        assert (found - wanted).norm() < (was - wanted).norm(), name


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "qwen3", "mistral"])
@pytest.mark.parametrize("change", ["nothing", "patched", "first block"])
def test_blocks_before_the_first_change_run_once_for_both_models(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, name: str, change: str
) -> None:
    """Oracle: the repair that runs every block of both models."""
    dense = tiny(name)
    _, axes = described(dense)
    masks = {axis.name: torch.ones(axis.size) for axis in axes}
    layers = next(axis for axis in axes if axis.kind == Kind.LAYER)
    masks[layers.name][layers.size - 1] = 0
    of = replace(pair(dense, masks), dimensions=None)
    arch, _ = described(dense)
    first = arch.blocks(of.smaller)[0]
    if change == "patched":
        first.register_forward_hook(lambda *_: None)
    if change == "first block":
        with torch.no_grad():
            next(first.parameters()).mul_(1.01)
    ran: list[tuple[nn.Module, int]] = []
    run = two_streams.Stream.run

    def counted(self: Any, layer: int, *given: Any, **named: Any) -> Any:
        ran.append((self.blocks[layer], layer))
        return run(self, layer, *given, **named)

    monkeypatch.setattr(two_streams.Stream, "run", counted)
    model, notes = of.repaired()
    of_smaller = [layer for block, layer in ran if any(block is one for one in arch.blocks(model))]
    monkeypatch.setattr(repair_targets.Targets, "same_until", lambda _: 0)
    ran.clear()
    whole, wanted = of.repaired()
    assert notes == wanted
    for name_, parameter in model.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name_)), name_
    every = [layer for block, layer in ran if any(block is one for one in arch.blocks(whole))]
    last = max(every)
    spared = [layer for layer in range(last) if of_smaller.count(layer) < every.count(layer)]
    assert spared == ([] if change != "nothing" else list(range(last)))
