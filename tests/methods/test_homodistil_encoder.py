"""HomoDistil on encoders: masked language models and classifiers, published sizes, norms over what is left between two
cuts, checkpoints that the stock class opens, and a killed run.
"""

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, BertForSequenceClassification

import compresso
from compresso.arch.base import arch_for
from compresso.arch.queries import WITHIN, axes_of
from compresso.core.axis import Kind
from compresso.core.budget import InfeasibleBudget
from compresso.core.cost import CostModel
from compresso.core.masking import Masking, masked
from compresso.core.plan import Plan
from compresso.edit.gate import gated
from compresso.edit.removal import remove_
from compresso.errors import BudgetError, RecipeError
from compresso.formats.hf import save_checkpoint
from compresso.job import Job
from compresso.methods.homodistil import HomoDistil
from compresso.runner.options import recipe_for
from compresso.runner.recipe import build, read, with_knob
from compresso.tasks.classification import CLASSIFICATION
from compresso.tasks.masked_lm import MASKED_LM
from compresso.training.gradual_pruning import GradualPruning
from compresso.training.order import Micro
from tests.methods.test_homodistil import distilled, numbers, stepped, training
from tests.tasks.conftest import SIZES, VOCABULARY

Make = Callable[..., Job]
MASK = len(VOCABULARY)
KNOBS: dict[str, Any] = {"keep": 0.6, "of": "total"}
NARROWS = {**KNOBS, "kinds": ("head_channel", "channel", "hidden")}
"""Heads get narrower, as published; without it whole heads leave."""
HOW = pytest.mark.parametrize("knobs", [KNOBS, NARROWS], ids=["heads", "channels of heads"])


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make(folder="work", labels=0): a job of a masked language model, or of a classifier with so many labels."""

    def _make(folder: str = "work", labels: int = 0) -> Job:
        generator = torch.Generator().manual_seed(3)
        config = BertConfig(**SIZES | {"vocab_size": MASK + 1}, **({"num_labels": labels} if labels else {}))
        model = (BertForSequenceClassification if labels else BertForMaskedLM)(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(0, 0.3, generator=generator)
        dense = copy.deepcopy(model)
        starts = torch.randint(4, MASK - 12, (30,), generator=generator).tolist()
        texts = [[2, *range(start, start + 10), 3] for start in starts]
        rows: list[Any] = [{"input_ids": text, "labels": [i % max(labels, 1)]} for i, text in enumerate(texts)]
        if not labels:
            of = Masking(MASK, MASK + 1, (0, 1, 2, 3, MASK))
            pairs = [masked(text, of, i) for i, text in enumerate(texts)]
            rows = [{"input_ids": seen, "labels": asked, "masking": of} for seen, asked in pairs]
        return Job(
            model=model,
            arch=arch_for(config),
            tokenizer=None,
            rows=rows[6:],
            held=rows[:6],
            plan=Plan(),
            records={},
            identity={},
            seed=0,
            out=tmp_path / folder,
            quiet=True,
            task=CLASSIFICATION if labels else MASKED_LM,
            labels=tuple("abc"[:labels]),
            original=lambda dtype, device: copy.deepcopy(dense).to(device, dtype),
        )

    return _make


@pytest.mark.parametrize("labels", [0, 3])
def test_at_first_student_and_teacher_are_one(make: Make, labels: int) -> None:
    job = make(labels=labels)
    objective = training(job, **KNOBS).eval()
    found = numbers(objective(job.collated(job.rows[:4]), Micro(0, 0, range(4))))
    assert found.keys() == {"loss", "hard", "divergence", "embedding", "hidden", "attention"}
    assert all(abs(value) < 1e-6 for name, value in found.items() if name not in ("loss", "hard"))


@HOW
@pytest.mark.parametrize("labels", [0, 3])
def test_masked_is_cut_at_every_cut(
    make: Make, monkeypatch: pytest.MonkeyPatch, labels: int, knobs: dict[str, Any]
) -> None:
    """The student between two cuts, hooks and zeros, against masks, and against what is cut."""
    job = make(labels=labels)
    objective = training(job, **knobs, cuts=2)
    checked: list[float] = []
    before: list[Tensor] = []
    ids = job.collated(job.rows[:4])["input_ids"]

    def logits(model: Any) -> Tensor:
        with torch.no_grad():
            return model.eval()(input_ids=ids).logits

    def compared(model: Any, axes: Any, masks: Any, *rest: Any, **how: Any) -> float:
        with gated(model, axes, masks):
            expected = logits(model)
        difference = remove_(model, axes, masks, *rest, **how)
        checked.append(float((logits(model) - expected).abs().max()))
        checked.append(float((before[0] - expected).abs().max()))
        return difference

    monkeypatch.setattr("compresso.training.gradual_pruning.remove_", compared)
    zero = GradualPruning._zero_  # pyright: ignore[reportPrivateUsage]

    def zeroed(self: GradualPruning) -> None:
        zero(self)
        if self.left().ours:
            before[:] = [logits(self.model)]
            self.model.train()

    monkeypatch.setattr(GradualPruning, "_zero_", zeroed)
    with objective.attached():
        stepped(job, objective, 8)
    assert len(checked) == 4 and max(checked) < 1e-5 and job.model.config.hidden_size < 32
    assert not any(module._forward_hooks for module in job.model.modules())  # pyright: ignore[reportPrivateUsage]


@HOW
@pytest.mark.parametrize("labels", [0, 3])
def test_the_stock_class_opens_the_result(make: Make, labels: int, tmp_path: Path, knobs: dict[str, Any]) -> None:
    job = distilled(make(labels=labels), **knobs)
    (shape,) = set(job.arch.shapes(job.model))
    width = next(iter(job.arch.blocks(job.model))).get_submodule("attention.self").attention_head_size
    assert job.model.config.hidden_size == width * shape.query_heads < 32
    assert (width < 8 and shape.query_heads == 4) if knobs is NARROWS else width == 8
    assert save_checkpoint(job.model, job.arch.shapes(job.model), tmp_path / "out") == "uniform"
    opened = type(job.model).from_pretrained(tmp_path / "out").eval()
    ids = job.collated(job.held)["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(opened(input_ids=ids).logits, job.model(input_ids=ids).logits)
    records = job.records["homodistil"]
    assert records["parameters_after"]["total"] == opened.num_parameters()
    assert 0.4 < records["parameters_after"]["total"] / records["parameters_before"]["total"] <= 0.6


@HOW
@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(
    make: Make, monkeypatch: pytest.MonkeyPatch, knobs: dict[str, Any]
) -> None:
    """From between two cuts, over the second, with dropout and masks that are drawn anew in every pass."""
    knobs = {**knobs, "save_every": 3, "cuts": 2}
    whole = distilled(make("whole"), **knobs)
    stopped, prune = make("stopped"), GradualPruning.prune_

    def stops(self: GradualPruning, update: int) -> dict[str, float]:
        told = prune(self, update)
        if update == 7:
            raise KeyboardInterrupt
        return told

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(GradualPruning, "prune_", stops)
        distilled(stopped, **knobs)
    assert not any(module._forward_hooks for module in stopped.model.modules())  # pyright: ignore[reportPrivateUsage]
    cut = make("cut")
    shutil.copytree(stopped.out, cut.out)
    resumed = distilled(cut, **knobs)
    assert resumed.plan == whole.plan and resumed.records == whole.records
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    ("recipe", "millions"),
    [("homodistil", 65.0), ("homodistil/small", 17.3), ("homodistil/xsmall", 15.6), ("homodistil/tiny", 14.1)],
)
def test_the_published_sizes_of_bert(recipe: str, millions: float) -> None:
    """Shares of BERT-base with the channels of heads and hidden dimensions in one ratio: all 12 heads stay."""
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(BertConfig())
    arch = arch_for(model.config)
    axes = axes_of(arch, model, WITHIN)
    (stage,) = [one for _, one in build(read(recipe)).stages]
    assert isinstance(stage, HomoDistil)
    cost = CostModel(axes, arch.weights(model))
    plan = stage.dry_run_plan(axes, cost)
    (width,) = {len(units) for name, units in plan.kept.items() if name.endswith((".matches", ".values"))}
    assert len(plan.kept["hidden"]) == 12 * width and not any(name.endswith("heads") for name in plan.kept)
    assert float(cost.of(plan).total) / 1e6 == pytest.approx(millions, rel=0.005)
    with pytest.raises(InfeasibleBudget, match=r"keep=0\.001 allows .* Raise keep to"):
        HomoDistil(keep=0.001).dry_run_plan(axes, cost)


def test_whole_heads_leave_with_the_stream_whatever_a_config_with_a_fixed_stream_could_name() -> None:
    """The options hold BERT's heads to multiples of all 12, which is right only where the hidden size stays."""
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(BertConfig())
    axes = axes_of(arch_for(model.config), model, WITHIN)
    cost = CostModel(axes, arch_for(model.config).weights(model))
    plain = with_knob(read("homodistil/small"), "kinds", ["head", "channel", "hidden"])
    config = BertConfig(architectures=["BertForMaskedLM"])
    ((_, free),), ((_, held),) = build(plain).stages, recipe_for(plain, "auto", config).stages
    assert isinstance(free, HomoDistil) and isinstance(held, HomoDistil)
    plan = held.dry_run_plan(axes, cost)
    assert plan == free.dry_run_plan(axes, cost)
    assert (len(plan.kept["layers.0.heads"]), len(plan.kept["hidden"])) == (4, 256)


def test_multiples_hold_for_the_channels_of_heads_and_the_stream_and_are_named() -> None:
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(BertConfig())
    axes = axes_of(arch_for(model.config), model, WITHIN)
    cost = CostModel(axes, arch_for(model.config).weights(model))
    how: dict[str, Any] = {"of": "total", "kinds": NARROWS["kinds"]}
    for multiple_of, step in (({Kind.HEAD_CHANNEL: 5}, 60), ({Kind.HIDDEN: 32}, 96)):
        plan = HomoDistil(keep=0.3, multiple_of=multiple_of, **how).dry_run_plan(axes, cost)
        hidden = len(plan.kept["hidden"])
        assert hidden < 768 and hidden % step == 0 and hidden == 12 * len(plan.kept["layers.0.heads.0.values"])
    with pytest.raises(InfeasibleBudget) as caught:
        HomoDistil(keep=0.1, multiple_of={Kind.HEAD_CHANNEL: 32}, **how).dry_run_plan(axes, cost)
    assert caught.value.shortfall is not None
    least = caught.value.shortfall.share
    plan = HomoDistil(keep=least, multiple_of={Kind.HEAD_CHANNEL: 32}, **how).dry_run_plan(axes, cost)
    assert len(plan.kept["hidden"]) == 384


def test_a_head_narrower_than_the_stream_says_is_refused() -> None:
    for kinds in (("head_channel", "channel"), ("head", "head_channel", "hidden")):
        with pytest.raises(ValueError, match=r"name head_channel with hidden and without head, such as \["):
            HomoDistil(kinds=kinds)  # pyright: ignore[reportCallIssue]


def test_a_teacher_of_other_labels_is_refused_in_one_line(make: Make) -> None:
    job, other = make(labels=3), make("other", labels=2)
    with pytest.raises(RecipeError, match="the student decides among 3 classes, its teacher among 2") as caught:
        distilled(replace(job, original=lambda dtype, device: copy.deepcopy(other.model)), **KNOBS)
    assert "\n" not in str(caught.value) and not job.out.exists()


@pytest.mark.parametrize("knob", [{"multiple_of": {"hidden": 1000}}, {"floor": {"hidden": 9999}}])
def test_the_knob_that_holds_a_budget_up_is_named(make: Make, knob: dict[str, Any]) -> None:
    """Channels of heads are held with hidden dimensions, and have neither floor nor multiple to lower."""
    job = make()
    axes, budget = (
        axes_of(job.arch, job.model, WITHIN),
        replace(HomoDistil().removes, **{**NARROWS, **knob, "keep": 0.1}),
    )
    with pytest.raises(InfeasibleBudget) as caught:
        HomoDistil(removes=budget).final(axes, CostModel(axes, job.arch.weights(job.model)))
    ((name, given),) = knob.items()
    assert str(caught.value).endswith("or lower floor or multiple_of for 'hidden'")
    assert f"hidden may not go below 32 of 32 units ({name} is {given['hidden']:,})" in str(caught.value)


@pytest.mark.parametrize("kinds", [["head"], ["head", "channel"]])
def test_heads_that_all_stay_are_no_knob_to_lower(tmp_path: Path, kinds: list[str]) -> None:
    BertConfig(**SIZES, architectures=["BertForSequenceClassification"]).save_pretrained(tmp_path)
    raw = {"name": "r", "stages": [{"homodistil": {"keep": 0.05, "of": "blocks", "kinds": kinds}}]}
    with pytest.raises(
        BudgetError, match=r"all heads stay, as a bert config cannot .*stages\.homodistil\.kinds="
    ) as caught:
        compresso.plan(raw, tmp_path, task="classification")
    assert "multiple_of" not in str(caught.value)
