"""What an expert's matrices read, in every family of mixtures. Oracle: the family's own forward for one expert."""

from collections.abc import Callable

import pytest
import torch
from tests.arch.conftest import MIXTURES
from tests.arch.conftest import tiny as tiny
from transformers import PreTrainedModel

from compresso.errors import ArchError
from compresso.observe.experts import alone, read_by
from compresso.sweep.targets import matrix


@pytest.mark.parametrize("name", MIXTURES)
def test_the_second_product_of_what_it_reads_is_what_the_expert_writes(
    tiny: Callable[[str], PreTrainedModel], name: str
) -> None:
    model = tiny(name)
    experts = model.get_submodule("model.layers.3.mlp.experts")
    states = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for expert in (0, 2):
            assert read_by(experts, "gate_up_proj", expert, states) is states
            read = read_by(experts, "down_proj", expert, states)
            written = read @ matrix(model, f"model.layers.3.mlp.experts.down_proj.{expert}").T
            if hasattr(experts, "down_proj_bias"):
                written = written + experts.down_proj_bias[expert]
            assert torch.allclose(written, alone(experts, states, expert), atol=1e-6)
    with pytest.raises(ArchError, match=r"nobody described what the experts' up_proj reads; add '\*.up_proj.\*'"):
        read_by(experts, "up_proj", 0, states)
