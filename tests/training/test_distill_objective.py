"""The distillation loss is the one written out over all logits, and its teacher is left alone."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from compresso.errors import ArchError, RecipeError
from compresso.training.distill_objective import DistillObjective
from compresso.training.halves import Network
from compresso.training.order import Micro

MICRO = Micro(0, 0, range(3))
SIZES: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(seed: int, **sizes: Any) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(**{**SIZES, "initializer_range": 0.5, "tie_word_embeddings": True, **sizes})
        )
    return model.eval()


def batch(padding: int = 0) -> dict[str, Tensor]:
    """Three rows of seven tokens whose first three are a prompt, and columns of padding."""
    ids = torch.randint(3, 20, (3, 7), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :3] = -100
    return {
        "input_ids": functional.pad(ids, (0, padding)),
        "attention_mask": functional.pad(torch.ones_like(ids), (0, padding)),
        "labels": functional.pad(labels, (0, padding), value=-100),
    }


def objective(student: PreTrainedModel, teacher: PreTrainedModel, **knobs: Any) -> DistillObjective:
    layers = bool(knobs.get("intermediate_weight"))
    ours, theirs = (Network(model, list(model.model.layers) if layers else ()) for model in (student, teacher))  # type: ignore[attr-defined]
    return DistillObjective(student, ours, theirs, **knobs)


def gradients(one: DistillObjective, given: dict[str, Tensor]) -> dict[str, Tensor]:
    one.zero_grad()
    one(given, MICRO)["loss"].backward()
    return {name: parameter.grad.clone() for name, parameter in one.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("tokens", ["labelled", "all"])
def test_the_loss_is_the_one_over_all_logits(tokens: Any) -> None:
    student, teacher, given = llama(0), llama(1), batch(padding=2)
    numbers = objective(student, teacher, tokens=tokens, hard_weight=0.25, temperature=2.0, chunk=4)(given, MICRO)
    log_q, log_p = (model(**given).logits.div(2.0).log_softmax(-1) for model in (student, teacher))
    kl = functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    counted = given["attention_mask"].bool()
    counted[:, : 2 if tokens == "labelled" else 0] = False
    if tokens == "labelled":
        counted[:, 6:] = False  # the last token has nothing to predict
    divergence = 4 * kl[counted].mean()
    hard = functional.cross_entropy(student(**given).logits[:, 2:6].flatten(0, 1), given["input_ids"][:, 3:7].flatten())
    torch.testing.assert_close(numbers["divergence"], divergence.detach())
    torch.testing.assert_close(numbers["hard"], hard.detach())
    torch.testing.assert_close(numbers["loss"], divergence + 0.25 * hard)


@pytest.mark.parametrize(
    "knobs", [{}, {"divergence": "reverse", "tokens": "all"}, {"divergence": "js", "hard_weight": 0.5}]
)
def test_gradients_are_those_of_the_plain_loss_whatever_the_chunk(knobs: dict[str, Any]) -> None:
    """All weights, with the head tied to the embedding: both of its uses are counted."""
    student, teacher, given = llama(0), llama(1), batch()
    whole, pieces = (gradients(objective(student, teacher, chunk=chunk, **knobs), given) for chunk in (1000, 5))
    assert whole.keys() == pieces.keys() == {f"model.{name}" for name, _ in student.named_parameters()}
    for name in whole:
        torch.testing.assert_close(pieces[name], whole[name], atol=1e-6, rtol=1e-4, msg=name)
    if not knobs:
        student.zero_grad()
        log_q, log_p = (model(**given).logits[:, 2:6].log_softmax(-1).flatten(0, 1) for model in (student, teacher))
        functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean").backward()
        for name, parameter in student.named_parameters():
            torch.testing.assert_close(whole[f"model.{name}"], parameter.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_padding_teaches_nothing() -> None:
    student, teacher = llama(0), llama(1)
    for tokens in ("labelled", "all"):
        one = objective(student, teacher, tokens=tokens, intermediate_weight=1.0)
        torch.testing.assert_close(one(batch(padding=5), MICRO), one(batch(), MICRO))


def test_an_equal_student_learns_nothing() -> None:
    teacher = llama(1)
    one = objective(copy.deepcopy(teacher), teacher, intermediate_weight=1.0)
    assert max(float(gradient.abs().max()) for gradient in gradients(one, batch()).values()) < 1e-6
    with torch.no_grad():
        numbers = one(batch(), MICRO)
    assert max(abs(float(number)) for number in numbers.values()) < 1e-6


def test_the_teacher_is_frozen_in_evaluation_mode_and_not_part_of_the_objective() -> None:
    student, teacher = llama(0), llama(1, attention_dropout=0.5)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    one = objective(student, teacher).train()
    gradients(one, batch())
    assert not any(module.training for module in teacher.modules())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert len(list(one.parameters())) == len(list(student.parameters()))
    torch.testing.assert_close(one(batch(), MICRO)["divergence"], one(batch(), MICRO)["divergence"], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_hidden_states_weigh_as_much_as_the_divergence_and_are_compared_block_by_block(kind: Any) -> None:
    student, teacher, given = llama(0), llama(1), batch()
    numbers = objective(student, teacher, intermediate_weight=0.5, intermediate=kind)(given, MICRO)
    torch.testing.assert_close(numbers["loss"].detach(), 1.5 * numbers["divergence"])
    found: dict[PreTrainedModel, list[Tensor]] = {student: [], teacher: []}
    for model, states in found.items():
        for layer in model.model.layers:
            layer.register_forward_hook(
                lambda module, inputs, output, states=states: states.append(output[:, 2:6].flatten(0, 1))
            )
        model(**given)
    distance: Callable[[Tensor, Tensor], Tensor] = (
        functional.mse_loss if kind == "mse" else lambda a, b: 1 - functional.cosine_similarity(a, b, dim=-1).mean()
    )
    wanted = torch.stack([distance(ours, theirs) for ours, theirs in zip(*found.values(), strict=True)]).mean()
    torch.testing.assert_close(numbers["intermediate"], wanted.detach())


def test_only_the_dimensions_that_are_left_are_compared() -> None:
    """A student that is the teacher without dimensions that are always zero is no distance away on the others."""
    teacher = llama(1)
    left = torch.tensor([0, 2, 3, 7, 8, 9, 12, 15])
    gone = [i for i in range(16) if i not in left.tolist()]
    small = llama(0, hidden_size=8, num_attention_heads=2, head_dim=8)
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if name.endswith(("embed_tokens.weight",)):
                parameter[:, gone] = 0
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter[gone] = 0
        for (name, ours), theirs in zip(small.named_parameters(), teacher.parameters(), strict=True):
            if name.endswith("norm.weight"):
                ours.copy_(theirs[left] * 2**0.5)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                ours.copy_(theirs[left])
            else:
                ours.copy_(theirs[:, left])
    for module in small.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon *= 2.0
    numbers = objective(small, teacher, intermediate_weight=1.0, dimensions=left)(batch(), MICRO)
    assert float(numbers["intermediate"]) < 1e-6
    wrong = objective(small, teacher, intermediate_weight=1.0, dimensions=left.flip(0))(batch(), MICRO)
    assert float(wrong["intermediate"]) > 0.1


def test_recomputed_activations_give_the_same_gradients() -> None:
    found: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        student = llama(0)
        if checkpointing:
            student.activation_checkpointing_enable({"use_reentrant": False})
        found.append(gradients(objective(student, llama(1), intermediate_weight=1.0).train(), batch()))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


def test_a_teacher_in_half_precision_is_nearly_the_same() -> None:
    student, given = llama(0), batch()
    exact, half = (
        objective(student, llama(1).to(dtype))(given, MICRO)["divergence"] for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(float(exact), rel=0.05)
    assert float(half) != float(exact)


def test_logits_that_are_capped_after_the_head_are_capped_here() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Gemma2ForCausalLM(
            Gemma2Config(**SIZES, initializer_range=2.0, final_logit_softcapping=3.0, sliding_window=8)
        ).eval()
    Network(model).check()
    last, _ = Network(model).read(batch())
    torch.testing.assert_close(Network(model).logits(last), model(**batch()).logits)


def test_logits_that_are_changed_in_an_unknown_way_are_refused() -> None:
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    model = CohereForCausalLM(CohereConfig(**sizes, logit_scale=0.5)).eval()
    with pytest.raises(ArchError, match="CohereForCausalLM changes its logits"):
        objective(model, model)


def test_other_vocabularies_are_refused_before_training() -> None:
    with pytest.raises(RecipeError, match="vocabulary of 20, its teacher one of 24"):
        objective(llama(0), llama(1, vocab_size=24))


def test_a_batch_without_labels_is_refused() -> None:
    given = {**batch(), "labels": torch.full((3, 7), -100)}
    with pytest.raises(ValueError, match="0 tokens"):
        objective(llama(0), llama(1))(given, MICRO)
    with pytest.raises(ValueError, match="hard_weight"):
        objective(llama(0), llama(1), tokens="all", hard_weight=1.0)(given, MICRO)
    assert float(objective(llama(0), llama(1), tokens="all")(given, MICRO)["divergence"]) > 0
