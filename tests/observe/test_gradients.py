"""Gradients of weights against autograd taken plainly, and a model that is left as it was."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from compresso.core.losses import next_token_loss
from compresso.errors import NumericError
from compresso.observe.gradients import weight_fisher, weight_gradients

NAMES = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight")


@pytest.fixture
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "vocab_size": 50,
    }
    made = LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0, tie_word_embeddings=True)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    return made


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 50, (5, 9), generator=torch.Generator().manual_seed(1))
    mask, labels = torch.ones_like(ids), ids.clone()
    for row in range(5):  # examples of different length, part of each not labelled
        mask[row, 9 - row :] = 0
        labels[row, 9 - row :] = labels[row, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plainly(model: PreTrainedModel, examples: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    inputs = {name: value for name, value in examples.items() if name != "labels"}
    loss = next_token_loss(model(**inputs).logits, examples["labels"])
    parameters = dict(model.named_parameters())
    return dict(zip(NAMES, torch.autograd.grad(loss, [parameters[name] for name in NAMES]), strict=True))


@pytest.mark.parametrize("micro_batch", [1, 2, 5])
def test_a_batch_s_gradient_does_not_depend_on_its_parts(model: PreTrainedModel, micro_batch: int) -> None:
    wanted = plainly(model, batch())
    got = weight_gradients(model, NAMES, batch(), micro_batch)
    assert set(got) == set(NAMES)
    for name in NAMES:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-7)


def test_fisher_squares_example_by_example(model: PreTrainedModel) -> None:
    examples = batch()
    single = [plainly(model, {name: value[i : i + 1] for name, value in examples.items()}) for i in range(5)]
    got = weight_fisher(model, NAMES, examples)
    for name in NAMES:
        torch.testing.assert_close(got[name], sum(one[name] ** 2 for one in single) / 5, rtol=1e-4, atol=1e-9)
    whole = plainly(model, examples)
    assert not torch.allclose(got[NAMES[0]], whole[NAMES[0]] ** 2, rtol=0.1)


def test_the_model_is_left_as_it_was(model: PreTrainedModel) -> None:
    frozen = model.get_parameter("model.layers.0.mlp.gate_proj.weight").requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weight_gradients(model, NAMES, batch(), 2)
    weight_fisher(model, NAMES, batch())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == [
        "model.layers.0.mlp.gate_proj.weight"
    ]
    assert not frozen.requires_grad
    plainly(model, batch())  # no hook is left that would take the gradient away


def test_float16_is_widened_meanwhile(model: PreTrainedModel) -> None:
    half = model.half()
    before = {name: tensor.clone() for name, tensor in half.state_dict().items()}
    squares = weight_fisher(half, NAMES, batch())
    after = half.state_dict()
    assert all(
        after[name].dtype == torch.float16 and torch.equal(tensor, after[name]) for name, tensor in before.items()
    )
    smallest = torch.finfo(torch.float16).smallest_normal
    assert ((squares[NAMES[1]] > 0) & (squares[NAMES[1]] < smallest)).any()  # float16 would have made these 0 or coarse


def test_a_gradient_that_is_not_finite_is_refused(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight")[0, 0] = float("inf")
    with pytest.raises(NumericError, match="layer 1 outputs NaN or Inf"):
        weight_gradients(model, NAMES, batch(), 5)
    assert all(parameter.requires_grad for parameter in model.parameters())
