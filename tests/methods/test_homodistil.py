"""HomoDistil: the student starts as its teacher, units only leave and leave in equal numbers, masked is cut at every
cut, moments follow, and a killed run goes on to the same weights, also across a cut.
"""

import copy
import itertools
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compresso.arch.queries import WITHIN, axes_of
from compresso.core.axis import Kind
from compresso.core.plan import Plan
from compresso.core.row import Row
from compresso.edit.gate import gated
from compresso.edit.in_place import cut_moments_, same_parameters
from compresso.edit.removal import remove_
from compresso.edit.shrink import shrink_
from compresso.errors import ArchError, CheckpointError, RecipeError
from compresso.job import Job
from compresso.methods.homodistil import HomoDistil
from compresso.solve.gradual import kept_share
from compresso.training.gradual_pruning import GradualPruning
from compresso.training.homodistil_objective import attention_maps
from compresso.training.order import Micro
from tests.methods.conftest import MakeJob

CONTRACT = {"keep": 0.7, "steps": 2, "batch": 4, "micro_batch": 4, "cuts": 1}
SHORT: dict[str, Any] = {"keep": 0.5, "steps": 10, "batch": 8, "micro_batch": 8, "lr": 3e-3, "cuts": 3, "chunk": 32}
KINDS = (Kind.HEAD, Kind.CHANNEL, Kind.HIDDEN)


def distilled(job: Job, **knobs: Any) -> Job:
    return HomoDistil(**{**SHORT, **knobs})(job)


def numbers(found: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in found.items()}


def training(job: Job, steps: int = 10, **knobs: Any) -> GradualPruning:
    """The objective of a run, with the student's attention as it is compared."""
    stage = HomoDistil(**{**SHORT, "steps": steps, **knobs})
    assert job.original is not None
    teacher = job.original(torch.float32, torch.device("cpu")).eval().requires_grad_(False)
    for model in (job.model, teacher):
        model.set_attn_implementation("eager")
    job.model.requires_grad_(True)
    final = stage.final(axes_of(job.arch, job.model, WITHIN), job.cost())
    return stage._objective(job, teacher, final, steps)  # pyright: ignore[reportPrivateUsage]


def stepped(job: Job, objective: GradualPruning, steps: int) -> torch.optim.Optimizer:
    """So many updates by hand."""
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2, weight_decay=0.1)
    objective.begin(optimizer)
    objective.train()
    for update in range(steps):
        batch = job.batches(8, "by hand").at(update, range(8))
        objective(batch, Micro(update, 0, range(8)))["loss"].backward()
        objective.observe_(update)
        optimizer.step()
        objective.prune_(update)
        optimizer.zero_grad()
    return optimizer


def test_at_first_student_and_teacher_are_one(make_job: MakeJob) -> None:
    """The spec's test a."""
    job = make_job()
    found = numbers(training(job)(job.collated(job.rows[:4]), Micro(0, 0, range(4))))
    assert found.keys() == {"loss", "hard", "divergence", "embedding", "hidden", "attention"}
    assert all(abs(value) < 1e-6 for name, value in found.items() if name not in ("loss", "hard"))
    assert found["loss"] == pytest.approx(found["hard"], abs=1e-5)


def test_the_loss_is_what_the_header_says(make_job: MakeJob) -> None:
    """Against transformers' own states, maps and losses, of a student that differs from its teacher."""
    job, weights = make_job(), {"kl": 0.5, "embedding": 2.0, "hidden": 0.25, "attention": 3.0}
    objective = training(job, **{f"{name}_weight": value for name, value in weights.items()})
    assert job.original is not None
    teacher = job.original(torch.float32, torch.device("cpu"))
    teacher.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in job.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        batch = job.collated(job.rows[:4])
        seen = {name: batch[name] for name in ("input_ids", "attention_mask")}
        ours, theirs = (
            model(**seen, output_hidden_states=True, output_attentions=True) for model in (job.model, teacher)
        )
        apart = lambda one, other: (one - other).square().mean()  # noqa: E731
        hidden = sum(apart(*pair) for pair in zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True))
        maps = sum(apart(*pair) for pair in zip(ours.attentions, theirs.attentions, strict=True))
        q, p = (one.logits[:, :-1].log_softmax(-1) for one in (ours, theirs))
        expected = {
            "hard": job.model(**batch).loss,
            "divergence": (p.exp() * (p - q)).sum(-1).mean(),
            "embedding": apart(ours.hidden_states[0], theirs.hidden_states[0]),
            "hidden": hidden,
            "attention": maps,
        }
        found = objective(batch, Micro(0, 0, range(4)))
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-4), name
    total = expected["hard"] + sum(weights[name] * expected["divergence" if name == "kl" else name] for name in weights)
    assert float(found["loss"]) == pytest.approx(float(total), rel=1e-4)


def test_padding_changes_nothing(make_job: MakeJob) -> None:
    job = make_job()
    objective = training(job)
    with torch.no_grad():
        for parameter in job.model.parameters():
            parameter.mul_(1.1)
    short: list[Row] = [{"input_ids": row["input_ids"][:6], "labels": row["labels"][:6]} for row in job.rows[:2]]
    alone = job.collated(short)
    wide = {
        name: nn.functional.pad(value, (0, 5), value=-100 if name == "labels" else 0) for name, value in alone.items()
    }
    one, other = (numbers(objective(batch, Micro(0, 0, range(2)))) for batch in (alone, wide))
    assert one == pytest.approx(other, rel=1e-4)


def test_counts_follow_the_curve_and_sets_lie_within_sets(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """The spec's test c, at every update, in every layer, whatever was cut meanwhile."""
    seen: list[Plan] = []
    settle = GradualPruning.settle_

    def watched(self: GradualPruning, done: int) -> dict[str, float]:
        told = settle(self, done)
        seen.append(self.plan())
        return told

    monkeypatch.setattr(GradualPruning, "settle_", watched)
    job = make_job()
    sizes = {axis.name: axis.size for axis in job.arch.axes(job.model) if axis.kind in KINDS}
    after = distilled(job)
    final = {name: len(units) for name, units in after.plan.kept.items()}
    assert final.keys() == sizes.keys() and len(seen) == 11  # the last once more, which changes nothing
    for done, plan in enumerate(seen[:10], start=1):
        for name, size in sizes.items():
            share = kept_share(final[name] / size, done, 0, 7)
            assert len(plan.kept[name]) == max(final[name], math.ceil(share * size - 1e-9)), (done, name)
    for earlier, later in itertools.pairwise(seen):
        assert all(set(units) <= set(earlier.kept[name]) for name, units in later.kept.items())
    assert len({final[name] for name in final if name.endswith("channels")}) == 1
    shapes = after.arch.shapes(after.model)
    assert len(set(shapes)) == 1 and shapes[0].channels == final["layers.0.channels"]
    records = after.records["homodistil"]
    assert records["parameters_after"]["total"] == sum(one.numel() for one in after.model.parameters())
    assert records["parameters_after"]["total"] <= 0.5 * records["parameters_before"]["total"]


@pytest.mark.parametrize("tied", [True, False])
def test_masked_is_cut_at_every_cut(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    """The spec's tests d and i: against the whole student with masks, which no code of the training has touched."""
    job = make_job(tied=tied)
    checked: list[float] = []

    def compared(model: Any, axes: Any, masks: Any, *rest: Any, **how: Any) -> float:
        ids = job.collated(job.rows[:4])["input_ids"]
        model.eval()
        with torch.no_grad():
            zeroed = model(input_ids=ids).logits
            with gated(model, axes, masks):
                masked = model(input_ids=ids).logits
            difference = remove_(model, axes, masks, *rest, **how)
            cut = model(input_ids=ids).logits
        checked.extend([float((zeroed - masked).abs().max()), float((cut - masked).abs().max())])
        return difference

    monkeypatch.setattr("compresso.training.gradual_pruning.remove_", compared)
    after = distilled(job, cuts=50)
    assert len(checked) >= 2 * 5 and max(checked) < 1e-5
    assert 0 < after.records["homodistil"]["masked_minus_smaller_max_abs"] < 1e-5


def test_what_is_gone_stays_0_with_its_moments_until_it_is_cut(make_job: MakeJob) -> None:
    job = make_job()
    objective = training(job, cuts=1)
    optimizer = stepped(job, objective, 5)
    axes = {axis.name: axis for axis in job.arch.axes(job.model)}
    parameters = dict(job.model.named_parameters())
    assert objective.left().ours.keys() >= {"hidden", "layers.0.channels"}
    for name, stays in objective.left().ours.items():
        gone = torch.ones(axes[name].size, dtype=torch.bool)
        gone[stays] = False
        assert bool(gone.any())
        for piece in axes[name].slices:
            parameter = parameters[piece.param]
            for tensor in (parameter.detach(), *(optimizer.state[parameter][key] for key in ("exp_avg", "exp_avg_sq"))):
                units = piece.entries(tensor, axes[name].size)
                assert not bool(units[gone].any()) and bool(units[~gone].any())


def test_moments_are_cut_as_weights_are(make_job: MakeJob) -> None:
    """The moments of a cut model are those that it would have had: its gradients are the parts of the whole model's."""
    job = make_job()
    axes = job.arch.axes(job.model)
    plan = Plan({"hidden": tuple(range(20)), "layers.1.channels": tuple(range(5, 40)), "layers.0.heads": (0, 2)})
    batch = job.collated(job.rows[:4])
    model = job.model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.0, 0.0), weight_decay=0.0)
    with gated(model, axes, plan.masks(axes)):
        model(**batch).loss.backward()
    optimizer.step()
    before = list(model.parameters())
    cut_moments_(dict(optimizer.state), model, axes, plan)
    with same_parameters(model):
        shrink_(model, axes, plan)
    assert all(one is other for one, other in zip(before, model.parameters(), strict=True))
    model.zero_grad()
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        state = optimizer.state[parameter]
        torch.testing.assert_close(state["exp_avg"], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)
        torch.testing.assert_close(state["exp_avg_sq"], parameter.grad**2, rtol=1e-3, atol=1e-7, msg=name)


def test_a_unit_that_does_nothing_leaves_first(make_job: MakeJob) -> None:
    job = make_job()
    dead = list(range(5, 15))
    with torch.no_grad():
        for layer in job.arch.blocks(job.model):
            layer.mlp.down_proj.weight[:, dead] *= 1e-4
            layer.mlp.gate_proj.weight[dead] *= 1e-4
            layer.mlp.up_proj.weight[dead] *= 1e-4
    blocks = float(job.cost()().blocks)
    after = distilled(job, keep=1 - 30 * 3 * 32 / blocks, of="blocks", kinds=["channel"], lr=1e-5)
    alive = tuple(unit for unit in range(48) if unit not in dead)
    assert dict(after.plan.kept) == {f"layers.{i}.channels": alive for i in range(3)}


def test_scores_are_of_the_whole_loss(make_job: MakeJob) -> None:
    """Doubling the task's weight changes them, and so does the teacher's, once the two differ."""

    def score(**knobs: Any) -> Tensor:
        job = make_job()
        objective = training(job, keep=0.9, **knobs)
        with torch.no_grad():
            for parameter in job.model.parameters():
                parameter.mul_(1.1)
        stepped(job, objective, 1)
        return objective.score

    plain = score()
    for knobs in ({"hard_weight": 2.0}, {"kl_weight": 2.0}, {"hidden_weight": 2.0}, {"attention_weight": 50.0}):
        assert not torch.allclose(score(**knobs), plain, rtol=1e-3), knobs


def test_labels_score_first_where_a_student_has_no_distance_from_its_teacher(make_job: MakeJob) -> None:
    """Without the task's loss all gradients are 0 but for rounding; by hand, of eight batches' labels."""
    knobs = {**SHORT, "micro_batch": 4, "hard_weight": 0.0, "attention_weight": 0.0}
    job = make_job()
    blind = training(job, **knobs)
    batch = job.batches(8, "homodistil").at(0, range(8))
    blind(batch, Micro(0, 0, range(8)))["loss"].backward()
    blind.observe_(0)
    rounding = float(blind.score.max())

    job = make_job(folder="labels")
    expected, batches = torch.zeros(48, dtype=torch.float64), job.batches(4, "homodistil")
    model = copy.deepcopy(job.model).requires_grad_(True)
    gate, up, down = (model.get_parameter(f"model.layers.0.mlp.{one}_proj.weight") for one in ("gate", "up", "down"))
    for update in range(8):
        model(**batches.at(update, range(4))).loss.backward()
        rows = [(one.detach() * one.grad).abs() for one in (gate, up, down) if one.grad is not None]
        expected = 0.85 * expected + 0.15 * (rows[0].sum(1) + rows[1].sum(1) + rows[2].sum(0))
        model.zero_grad()
    stage = HomoDistil(**knobs)
    objective = training(job, **knobs)
    assert stage._score_by_labels_(job, objective) == 8  # pyright: ignore[reportPrivateUsage]
    found_units = objective._flat.split(objective.score)["layers.0.channels"]  # pyright: ignore[reportPrivateUsage]
    torch.testing.assert_close(found_units, expected, rtol=1e-4, atol=0)
    assert float(found_units.min()) > 100 * rounding
    assert all(parameter.grad is None and parameter.requires_grad for parameter in job.model.parameters())
    after = distilled(make_job(folder="run"), hard_weight=0.0).records["homodistil"]
    assert after["batches_scored_by_labels"] == 8
    assert distilled(make_job(folder="both")).records["homodistil"]["batches_scored_by_labels"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("step", "hard"), [(1, 1.0), (4, 1.0), (5, 1.0), (9, 1.0), (5, 0.0)])
def test_a_killed_run_goes_on_to_the_same_weights(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, step: int, hard: float
) -> None:
    """With a checkpoint of two updates before, so that cuts between it and the kill are made again."""
    knobs = {"save_every": 2, "cuts": 4, "hard_weight": hard}
    whole = distilled(make_job(folder="whole"), **knobs)
    stopped, prune = make_job(folder="stopped"), GradualPruning.prune_

    def stops(self: GradualPruning, update: int) -> dict[str, float]:
        told = prune(self, update)
        if update == step:
            raise KeyboardInterrupt
        return told

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(GradualPruning, "prune_", stops)
        distilled(stopped, **knobs)
    cut = make_job(folder="cut")
    if stopped.out.is_dir():
        shutil.copytree(stopped.out, cut.out)
    resumed = distilled(cut, **knobs)
    assert resumed.plan == whole.plan
    assert resumed.records == whole.records
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    norms = [
        [module.variance_epsilon for module in one.model.modules() if hasattr(module, "variance_epsilon")]
        for one in (resumed, whole)
    ]
    assert norms[0] == norms[1] and norms[0]


def test_a_state_of_wider_tensors_is_put_back(make_job: MakeJob) -> None:
    """As after updates that were not finite: the newest checkpoint may be from before a cut."""
    from compresso.training.state import collect, restore_

    job = make_job()
    objective = training(job, cuts=2)
    optimizer = stepped(job, objective, 3)
    batch, micro = job.collated(job.rows[:4]), Micro(0, 0, range(4))
    objective.eval()
    before, saved = numbers(objective(batch, micro)), collect(objective, optimizer)
    width = job.model.config.hidden_size
    objective.settle_(7)
    assert job.model.config.hidden_size < width and numbers(objective(batch, micro)) != before
    restore_(objective, optimizer, saved)
    assert job.model.config.hidden_size == width and numbers(objective(batch, micro)) == before


def taught(job: Job) -> Job:
    """The job with a teacher that knows its language: a random one has nothing that fewer units could hold."""
    model = copy.deepcopy(job.model).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for update in range(120):
        model(**job.batches(8, "taught").at(update, range(8))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(False).eval()
    return replace(
        job, model=copy.deepcopy(model), original=lambda dtype, device: copy.deepcopy(model).to(device, dtype)
    )


def peak(job: Job, **knobs: Any) -> float:
    """The largest divergence of a run."""
    plain = {"steps": 60, "lr": 2e-3, "hard_weight": 0.0, "attention_weight": 0.0, "cuts": 4}
    record = distilled(job, **{**plain, **knobs}).records["homodistil"]
    return max(float(value) for value in record["curve"]["divergence"])


@pytest.mark.slow
def test_a_gradual_removal_keeps_the_gap_small(make_job: MakeJob) -> None:
    """The spec's test f: the peak is under half of that when all units leave after the first update."""
    job, knobs = taught(make_job()), {"lr": 5e-3, "keep": 0.6, "kinds": ["channel", "hidden"]}
    for seed in range(2):
        gradual, at_once = (
            peak(
                replace(job, model=copy.deepcopy(job.model), seed=seed, out=job.out / f"{seed} {done}"),
                done=done,
                **knobs,
            )
            for done in (0.7, 1e-6)
        )
        assert gradual < 0.5 * at_once, seed


def test_keeping_everything_changes_no_bit(make_job: MakeJob) -> None:
    before = {name: tensor.clone() for name, tensor in make_job().model.state_dict().items()}
    after = distilled(make_job(), keep=1.0).model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_maps_switch_attention_to_eager_and_back(make_job: MakeJob, caplog: pytest.LogCaptureFixture) -> None:
    job = make_job()
    assert job.model.config._attn_implementation == "sdpa"  # pyright: ignore[reportPrivateUsage]
    after = distilled(job, steps=2)
    assert "attention is eager while it trains, not sdpa" in caplog.text
    assert after.records["homodistil"]["attention"] == "eager, switched"
    assert after.model.config._attn_implementation == "sdpa"  # pyright: ignore[reportPrivateUsage]
    caplog.clear()
    plain = distilled(make_job(folder="plain"), steps=2, attention_weight=0.0)
    assert not caplog.text and plain.records["homodistil"]["attention"] == "as it was"


def test_fused_attention_has_no_maps(make_job: MakeJob) -> None:
    job = make_job()
    with (
        pytest.raises(ArchError, match=r"layer 0 \(LlamaDecoderLayer\) gives no attention maps; .*attention_weight"),
        torch.no_grad(),
        attention_maps(list(job.arch.blocks(job.model))),
    ):
        job.model(input_ids=torch.arange(8)[None])


def test_a_student_that_lost_units_before_goes_on_from_there(make_job: MakeJob) -> None:
    job = make_job()
    axes = job.arch.axes(job.model)
    masks = Plan({"hidden": tuple(range(2, 30)), "layers": (0, 2), "layers.2.heads": (0, 1, 3)}).masks(axes)
    job = replace(job.without(masks, "before"), records={})
    objective = training(job)
    found = numbers(objective(job.collated(job.rows[:4]), Micro(0, 0, range(4))))
    assert all(math.isfinite(value) for value in found.values()) and found["hidden"] > 0
    after = distilled(job, kinds=["channel", "hidden"])
    assert set(after.plan.kept["hidden"]) < set(range(2, 30)) and after.plan.kept["layers"] == (0, 2)
    assert after.plan.kept.keys() >= {"layers.0.channels", "layers.2.channels"}


def test_bad_knobs_name_the_cure(make_job: MakeJob) -> None:
    with pytest.raises(ValueError, match=r"start=0\.8 is not before done=0\.7"):
        HomoDistil(start=0.8)
    with pytest.raises(
        ValueError, match="only heads, channels of heads, channels and hidden dimensions leave a little at a time"
    ):
        HomoDistil(kinds=("layer",))
    with pytest.raises(ValueError, match="nothing is minimised"):
        HomoDistil(**{f"{name}_weight": 0 for name in ("hard", "kl", "embedding", "hidden", "attention")})
    with pytest.raises(CheckpointError, match="the dense model is the teacher here"):
        distilled(replace(make_job(), original=None))
    with pytest.raises(RecipeError, match="lost query heads before"):
        distilled(replace(make_job(), plan=Plan({"layers.0.heads.0.queries": (0,)})))


def test_a_teacher_of_other_tokens_is_refused_before_anything_is_trained(make_job: MakeJob) -> None:
    job = make_job()
    assert job.original is not None
    other = job.original(torch.float32, torch.device("cpu"))
    other.resize_token_embeddings(70)
    with pytest.raises(RecipeError, match="the student decides among 64 tokens, its teacher among 70") as caught:
        distilled(replace(job, original=lambda dtype, device: other))
    assert "\n" not in str(caught.value) and not job.out.exists()
