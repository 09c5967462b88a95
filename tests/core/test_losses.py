"""Cross-entropy against transformers' own causal loss,
and the Lagrangian's dynamics with Compresso's published rates.
"""

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from compresso.core.cost import CostModel
from compresso.core.hard_concrete import clamp_, initial_log_alpha, keep_probability
from compresso.core.losses import lagrangian, next_token_loss
from compresso.core.schedule import progress


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 11, generator=generator) * 3
    labels = torch.randint(11, (3, 7), generator=generator)
    labels[0, :4] = labels[1, 5:] = labels[2, ::2] = -100
    return logits, labels


def test_loss_and_gradient_equal_those_of_transformers() -> None:
    logits, labels = batch()
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, expected = next_token_loss(ours, labels), ForCausalLMLoss(theirs, labels, vocab_size=11)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_reduced_precision_logits_give_a_float32_loss() -> None:
    logits, labels = batch()
    loss = next_token_loss(logits.bfloat16(), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, next_token_loss(logits.bfloat16().float(), labels))


def test_no_labelled_position_is_an_error_not_nan() -> None:
    logits, labels = batch()
    nothing = torch.full_like(labels, -100)
    nothing[:, 0] = 3  # the first token is predicted by nothing
    with pytest.raises(ValueError, match=r"no position after the first is labelled in a batch \[3, 7\]"):
        next_token_loss(logits, nothing)
    with pytest.raises(ValueError, match=r"got \[3, 7, 11\] and \[3, 6\]"):
        next_token_loss(logits, labels[:, 1:])


def test_multipliers_climb_on_the_gap() -> None:
    lambda1, lambda2 = (torch.tensor(value, requires_grad=True) for value in (2.0, 4.0))
    sparsity = torch.tensor(0.25, requires_grad=True)
    lagrangian(sparsity, 0.5, lambda1, lambda2).backward()
    assert (lambda1.grad, lambda2.grad) == (-0.25, 0.0625)
    assert sparsity.grad == 2 + 2 * 4 * -0.25


def test_the_lagrangian_alone_ends_on_its_target(describe: object) -> None:
    """Gates at rate .1, multipliers ascending at .1, 200 updates of warm-up, then as many at the target."""
    cost: CostModel = describe(64, 4, 4, 176, 128)  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    gates = {axis.name: torch.nn.Parameter(initial_log_alpha(axis.kind, axis.size, generator)) for axis in cost.axes}
    lambda1, lambda2 = (torch.zeros((), requires_grad=True) for _ in range(2))
    descent = torch.optim.AdamW(gates.values(), lr=0.1, weight_decay=0)
    ascent = torch.optim.AdamW([lambda1, lambda2], lr=0.1, weight_decay=0, maximize=True)
    dense, share = float(cost().blocks), progress("linear", 200)
    path: list[float] = []
    for update in range(400):
        sparsity = 1 - cost({name: keep_probability(gate) for name, gate in gates.items()}).blocks / dense
        lagrangian(sparsity, 0.3 * share(update), lambda1, lambda2).backward()
        for optimizer in (descent, ascent):
            optimizer.step()
            optimizer.zero_grad()
        for gate in gates.values():
            clamp_(gate)
        path.append(float(lambda2.detach()))
    assert float(sparsity.detach()) == pytest.approx(0.3, abs=0.01)
    assert path == sorted(path) and path[-1] > 0


@pytest.mark.parametrize("labelled", [1, 5, 8, 11])
def test_few_and_many_labels_give_the_mean_over_the_labelled(labelled: int) -> None:
    """The two ways through the loss, with their gradients, against the definition."""
    generator = torch.Generator().manual_seed(labelled)
    logits = torch.randn(2, 6, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.full((2, 6), -100)
    labels.view(-1)[torch.randperm(12, generator=generator)[:labelled]] = torch.arange(labelled) % 9
    labels[0, 3] = 2
    loss = next_token_loss(logits, labels)
    pairs = [(row, at) for row in range(2) for at in range(1, 6) if labels[row, at] != -100]
    wanted = -sum(logits[row, at - 1].log_softmax(0)[labels[row, at]] for row, at in pairs) / len(pairs)
    assert isinstance(wanted, torch.Tensor)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)
    given, by_hand = (torch.autograd.grad(one, logits, retain_graph=True)[0] for one in (loss.double(), wanted))
    torch.testing.assert_close(given, by_hand, rtol=1e-4, atol=1e-6)
