"""A classifier under the laws: masked is smaller, scores are the squared slopes of its own loss, a head is what the
seed and the labels say; and its loss, its halves and its batches are those of its examples.
"""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.tasks.conftest import SIZES, MakeClassifier, tokenizer
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel, GPT2Config, ViTConfig

from compresso.core.axis import Kind
from compresso.core.loss import LABEL
from compresso.core.plan import Plan
from compresso.data.records import Labelled, Records
from compresso.edit.gate import gated
from compresso.edit.shrink import shrink_
from compresso.errors import DataError, RecipeError
from compresso.job import Job
from compresso.methods.distill import Distill
from compresso.methods.gate_taylor import GateTaylor
from compresso.methods.learn_gates import LearnGates
from compresso.methods.loraprune import LoraPrune
from compresso.methods.lorashear import LoraShear
from compresso.methods.recover import Recover
from compresso.observe.gate_taylor import gate_taylor
from compresso.observe.gradients import weight_gradients
from compresso.observe.losses import losses_without
from compresso.tasks.base import Reading
from compresso.tasks.classification import CLASSIFICATION
from compresso.training.distill_objective import DistillObjective
from compresso.training.halves import Whole
from compresso.training.order import Micro


def batch(job: Job, n: int = 6) -> dict[str, Tensor]:
    return job.collated(job.rows[:n])


@pytest.mark.parametrize(("pairs", "least"), [(False, 3), (True, 5)])
def test_a_limit_that_leaves_no_word_beside_special_tokens_is_refused(pairs: bool, least: int) -> None:
    rows = [Labelled("the cat", "the dog" if pairs else None, i % 2) for i in range(8)]
    records, config = Records("labelled", rows, "rows.jsonl"), BertConfig(**SIZES)
    with pytest.raises(DataError, match=rf"max_length={least - 1}: wanted at least {least}, for . special tokens and"):
        CLASSIFICATION.encode(records, tokenizer(), Reading(least - 1), config)
    made = CLASSIFICATION.encode(records, tokenizer(), Reading(least), config)
    assert all(len(row["input_ids"]) == least for row in made.rows)


def test_a_batch_is_padded_on_the_right_and_has_one_label_an_example() -> None:
    rows = [
        {"input_ids": [2, 5, 3], "labels": [1]},
        {"input_ids": [2, 5, 3, 6, 3], "labels": [0], "token_type_ids": [0, 0, 0, 1, 1]},
    ]
    made = CLASSIFICATION.collate(rows, pad_id=9)  # type: ignore[arg-type]
    assert made["input_ids"].tolist() == [[2, 5, 3, 9, 9], [2, 5, 3, 6, 3]]
    assert made["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert made["token_type_ids"].tolist() == [[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]
    assert made["labels"].tolist() == [1, 0]
    assert "token_type_ids" not in CLASSIFICATION.collate(rows[:1], pad_id=9)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="wanted at least one token a row"):
        CLASSIFICATION.collate([{"input_ids": [], "labels": [1]}], pad_id=0)


def test_the_loss_is_the_models_own(classifier: MakeClassifier) -> None:
    job = classifier()
    given = batch(job)
    with torch.no_grad():
        torch.testing.assert_close(LABEL(job.model, given), job.model(**given).loss)


@pytest.mark.parametrize("kinds", [(Kind.HEAD,), (Kind.CHANNEL,), (Kind.HEAD, Kind.CHANNEL)])
def test_masked_is_smaller_on_padded_examples(kinds: tuple[Kind, ...], classifier: MakeClassifier) -> None:
    """Law 1 for the classifier, on the examples that a run compares on."""
    job = classifier()
    axes = [axis for axis in job.arch.axes(job.model) if axis.kind in kinds]
    plan = Plan({axis.name: tuple(range(1, axis.size)) for axis in axes})
    given = batch(job)
    with torch.no_grad():
        whole = job.model(**given).logits
        with gated(job.model, axes, plan.masks(axes)):
            masked = job.model(**given).logits
        smaller = job.without(plan.masks(axes), "by hand")
        left = smaller.model(**given).logits
    torch.testing.assert_close(left, masked, rtol=0, atol=1e-5)
    assert float((whole - left).abs().max()) > 1e-2
    assert smaller.records["by hand"]["masked_minus_smaller_max_abs"] < 1e-5


def test_the_comparison_of_masked_and_smaller_sees_a_wrong_cut(
    classifier: MakeClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs on padded examples: a model that lost another unit than the masked one does not pass."""
    job = classifier()
    axes = [axis for axis in job.arch.axes(job.model) if axis.kind == Kind.CHANNEL]
    masks = Plan({axis.name: tuple(range(1, axis.size)) for axis in axes}).masks(axes)
    wrong = Plan({axis.name: tuple(range(axis.size - 1)) for axis in axes})
    monkeypatch.setattr("compresso.edit.removal.shrink_", lambda model, axes, plan, soft: shrink_(model, axes, wrong))
    with pytest.raises(Exception, match="differ from the masked model's"):
        job.without(masks, "wrong")


def test_a_score_predicts_what_dimming_the_gate_does_to_the_classifiers_loss(classifier: MakeClassifier) -> None:
    job = classifier()
    job = replace(job, model=job.model.double())
    axes = [axis for axis in job.arch.axes(job.model) if axis.kind in (Kind.HEAD, Kind.CHANNEL)]
    one = batch(job, 1)
    scores = gate_taylor(job.model, axes, [one], loss=LABEL)
    for axis in axes:
        unit, losses = int(scores[axis.name].argmax()), []
        for value in (0.99, 1.01):
            mask = torch.ones(axis.size, dtype=torch.float64)
            mask[unit] = value
            with torch.no_grad(), gated(job.model, axes, {axis.name: mask}):
                losses.append(float(LABEL(job.model, one)))
        slope = (losses[1] - losses[0]) / 0.02
        assert float(scores[axis.name][unit]) == pytest.approx(slope**2, rel=5e-2)


@pytest.mark.parametrize("micro_batch", [1, 4, 6])
def test_gradients_are_those_of_the_mean_over_labels(micro_batch: int, classifier: MakeClassifier) -> None:
    job = classifier()
    given, name = batch(job), "bert.encoder.layer.0.intermediate.dense.weight"
    found = weight_gradients(job.model, [name], given, micro_batch, LABEL)[name]
    parameter = job.model.get_parameter(name)
    (wanted,) = torch.autograd.grad(LABEL(job.model.requires_grad_(True), given), [parameter])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_losses_of_sub_models_are_those_of_smaller_ones(classifier: MakeClassifier) -> None:
    job = classifier()
    axes = [axis for axis in job.arch.axes(job.model) if axis.kind == Kind.CHANNEL]
    given = [batch(job, 5), batch(job, 2)]
    (found,) = losses_without(job.model, axes, [(axes[0].name, 3)], given, loss=LABEL)
    smaller = copy.deepcopy(job.model)
    shrink_(smaller, axes, Plan({axes[0].name: tuple(i for i in range(axes[0].size) if i != 3)}))
    with torch.no_grad():
        wanted = sum(float(LABEL(smaller, one)) * len(one["labels"]) for one in given) / 7
    assert float(found) == pytest.approx(wanted, abs=1e-5)


def test_a_classifier_is_taught_what_its_teacher_thinks(classifier: MakeClassifier) -> None:
    """The divergence is that of the closed form, 0 for its own teacher; hidden states of padding do not count."""
    job = classifier()
    given = batch(job, 4)
    halves = CLASSIFICATION.halves(job.model, ())
    own: Any = DistillObjective(job.model, halves, halves, compare=CLASSIFICATION.compare)
    assert own(given, Micro(0, 0, range(4)))["loss"].item() == pytest.approx(0, abs=1e-6)
    teacher = copy.deepcopy(job.model)
    with torch.no_grad():
        teacher.get_parameter("classifier.weight").mul_(-1)
        p, q = (model(**given).logits.log_softmax(-1) for model in (teacher, job.model))
        wanted = (p.exp() * (p - q)).sum(-1).mean() + 0.5 * job.model(**given).loss
    layers, others = (list(job.arch.blocks(model)) for model in (job.model, teacher))
    made = DistillObjective(
        job.model,
        CLASSIFICATION.halves(job.model, layers),
        CLASSIFICATION.halves(teacher, others),
        compare=CLASSIFICATION.compare,
        hard_weight=0.5,
        intermediate_weight=1.0,
    )
    padded = {**given, "input_ids": given["input_ids"].where(given["attention_mask"] == 1, 7)}
    numbers, other = (
        {name: value.item() for name, value in made(one, Micro(0, 0, range(4))).items()} for one in (given, padded)
    )
    assert numbers["divergence"] + 0.5 * numbers["hard"] == pytest.approx(float(wanted), rel=1e-4)
    assert numbers["intermediate"] == pytest.approx(0, abs=1e-6)  # the layers are the same
    assert other["loss"] == pytest.approx(numbers["loss"], abs=1e-6)


@pytest.mark.parametrize(("words", "same"), [("classes", "labels"), ("positions", "positions")])
def test_a_teacher_that_decides_among_other_things_is_refused(
    classifier: MakeClassifier, words: str, same: str
) -> None:
    model = classifier().model
    with pytest.raises(RecipeError, match=f"has 2 {words}, its teacher 3; distil from a teacher of the same {same}$"):
        DistillObjective(model, Whole(model, (), 2, words), Whole(model, (), 3, words))


SHORT = {"batch": 4, "micro_batch": 2, "rank": 2}


@pytest.mark.parametrize(
    "stage",
    [
        GateTaylor(keep=0.7, batches=1, batch=4),
        LearnGates(keep=0.7, tune=1, ramp=2, hold=1, kinds=(Kind.HEAD, Kind.CHANNEL), **SHORT),
        LoraPrune(keep=0.7, steps=4, every=2, **SHORT),
        LoraShear(keep=0.7, tune=1, shrink=4, periods=2, batches=1, **SHORT),
        Recover(steps=2, **SHORT),
        Recover(steps=2, train="all", **SHORT),
        Distill(steps=2, **SHORT),
        Distill(steps=2, train="all", intermediate_weight=1.0, **SHORT),
    ],
    ids=lambda stage: type(stage).__name__,
)
def test_stages_for_any_task_train_and_prune_a_classifier(stage: object, classifier: MakeClassifier) -> None:
    job = classifier()
    dense = copy.deepcopy(job.model)
    before = {name: value.clone() for name, value in job.model.state_dict().items()}
    job = replace(job, original=lambda dtype, device: copy.deepcopy(dense).to(device, dtype))
    after = stage(job)  # type: ignore[operator]
    assert isinstance(after.model, BertForSequenceClassification)
    state = after.model.state_dict()
    assert any(
        state[name].shape != value.shape or not torch.equal(state[name], value) for name, value in before.items()
    )
    assert all(bool(value.isfinite().all()) for value in state.values())
    share = after.records.get(next(iter(after.records)))["parameters_after"]["blocks"] if after.plan.kept else None
    assert share is None or share <= 0.7 * float(classifier().cost()().blocks)


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM])
def test_a_new_head_is_what_labels_and_seed_say_and_the_encoder_stays(kind: type) -> None:
    torch.manual_seed(0)
    base = kind(BertConfig(**SIZES)).eval()
    encoder = {name: value.clone() for name, value in base.base_model.state_dict().items()}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    made, other, again = (
        CLASSIFICATION.with_head(copy.deepcopy(base), ("no", "yes", "maybe"), seed) for seed in (0, 1, 0)
    )
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is left alone
    assert isinstance(made, BertForSequenceClassification) and not made.training
    assert made.config.id2label == {0: "no", 1: "yes", 2: "maybe"} and made.config.label2id["maybe"] == 2
    state = made.state_dict()
    assert all(torch.equal(state[f"bert.{name}"], value) for name, value in encoder.items())
    assert made.classifier.weight.shape == (3, 32)
    assert torch.equal(made.classifier.weight, again.classifier.weight)
    assert not torch.equal(made.classifier.weight, other.classifier.weight)
    assert all(module.config is made.config for module in made.modules() if hasattr(module, "config"))
    given = {"input_ids": torch.tensor([[2, 5, 3]])}
    with torch.no_grad():
        hidden = base.base_model(**given).last_hidden_state
        torch.testing.assert_close(made.bert(**given).last_hidden_state, hidden)


def test_what_cannot_be_classified_says_so() -> None:
    assert CLASSIFICATION.obstacle(BertConfig()) == ""
    assert "is a causal language model; --task classification takes an encoder" in CLASSIFICATION.obstacle(GPT2Config())
    assert "reads no text" in CLASSIFICATION.obstacle(ViTConfig())
    assert CLASSIFICATION.lacks_head(BertConfig(architectures=["BertModel"]))
    assert not CLASSIFICATION.lacks_head(BertConfig(architectures=["BertForSequenceClassification"]))


@pytest.mark.parametrize(("rows", "held"), [(40, 32), (400, 80), (10_000, 256)])
def test_a_fifth_is_held_out_within_bounds(rows: int, held: int) -> None:
    assert CLASSIFICATION.held_out(rows) == held


@pytest.mark.parametrize("padding", [None, -1, 10**6])
def test_a_padding_id_without_a_row_does_not_reach_the_model(classifier: MakeClassifier, padding: int | None) -> None:
    job = classifier()
    wanted = CLASSIFICATION.score(job.model, job.rows).mean
    job.model.config.pad_token_id = padding
    assert CLASSIFICATION.score(job.model, job.rows).mean == pytest.approx(wanted)
