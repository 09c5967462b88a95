"""A removed input that is constant is replaced exactly by the bias."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from compresso.edit.compensate import compensate_


def test_constant_inputs_leave_without_a_trace() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4)
    x[:, 1] = 3.0
    for linear in (nn.Linear(4, 3), Conv1D(3, 4)):
        nn.init.normal_(linear.bias)
        expected = linear(x)
        removed = torch.tensor([False, True, False, False])
        assert compensate_(linear, x.double().mean(dim=0), removed)
        torch.testing.assert_close(linear(x.masked_fill(removed, 0)), expected)


def test_without_a_bias_nothing_is_done() -> None:
    linear = nn.Linear(4, 3, bias=False)
    before = linear.weight.clone()
    assert not compensate_(linear, torch.ones(4), torch.ones(4, dtype=torch.bool))
    assert torch.equal(linear.weight, before)
