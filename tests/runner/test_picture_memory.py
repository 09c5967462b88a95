"""The memory of a process that reads a picture, and the reason where it is not known."""

import pytest
from tests.tasks.scenes import NARROW
from transformers import MobileViTConfig, MobileViTForSemanticSegmentation

from compresso.arch.base import arch_for
from compresso.core.plan import Plan
from compresso.edit.shrink import shrink_
from compresso.runner.evaluated import Evaluated
from compresso.runner.final_evaluation import _add_memory


def segmenter() -> MobileViTForSemanticSegmentation:
    return MobileViTForSemanticSegmentation(MobileViTConfig(**NARROW, num_labels=5)).eval()


@pytest.mark.slow
@pytest.mark.engines
def test_libraries_and_weights_count() -> None:
    found = Evaluated()
    _add_memory(found, segmenter())
    (peak,) = found.measurements
    assert (peak.name, peak.unit, peak.how) == ("memory/peak", "bytes", "measured")
    assert 100e6 < peak.value < 4e9 and not found.not_measured


@pytest.mark.engines
def test_a_model_that_no_config_holds_has_none_and_says_so() -> None:
    model, found = segmenter(), Evaluated()
    axes = arch_for(model.config).axes(model)
    axis = next(axis for axis in axes if axis.name == "stages.0.0.wide")
    shrink_(model, axes, Plan({axis.name: (0, 1, 2)}))
    _add_memory(found, model)
    assert not found.measurements and "cannot hold this mobilevit" in str(found.not_measured["memory"])
