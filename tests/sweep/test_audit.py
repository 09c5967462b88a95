"""The audit notices every kind of change, and lets no stray one pass."""

import pytest
import torch
from torch import nn

from compresso.errors import NumericError
from compresso.sweep.audit import audit, fingerprints


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3).to(torch.bfloat16), nn.BatchNorm1d(3))


def test_zeros_are_counted_and_changes_named() -> None:
    net = model()
    before = fingerprints(net.state_dict())
    net[0].weight.data[0, :3] = 0
    facts = audit(net.state_dict(), before, ["0", "1"])
    assert facts["zeros"] == {"0.weight": "3/24", "1.weight": "0/18"}
    assert facts["sparsity"] == 3 / 42
    assert facts["changed"] == 1
    assert facts["meant_but_unchanged"] == ["1.weight"]


@pytest.mark.parametrize("name", ["0.bias", "1.weight", "2.running_mean"])
def test_a_stray_change_is_an_error(name: str) -> None:
    net = model()
    before = fingerprints(net.state_dict())
    net.state_dict()[name].view(-1)[-1] += 0.125
    with pytest.raises(NumericError, match=name.replace(".", r"\.") + " changed and was not meant to"):
        audit(net.state_dict(), before, ["0"])


def test_two_entries_that_change_places_are_noticed() -> None:
    net = model()
    before = fingerprints(net.state_dict())
    net[0].weight.data[0, :2] = net[0].weight.data[0, :2].flip(0)
    assert fingerprints(net.state_dict())["0.weight"] != before["0.weight"]
    assert fingerprints(net.state_dict())["1.weight"] == before["1.weight"]
