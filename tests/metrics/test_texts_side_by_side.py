"""Texts of prompts of different lengths, written side by side, are those that each prompt gets alone."""

from collections.abc import Callable

import pytest
from transformers import PreTrainedModel

from compresso.metrics import generation
from tests.arch.conftest import CLASSES, CONFIGS
from tests.arch.conftest import tiny as tiny

PROMPTS = ([5], [7, 8, 9, 10, 11, 12], [3, 4], [20, 21, 22, 23])


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in CLASSES])
def test_padding_changes_no_text(name: str, tiny: Callable[[str], PreTrainedModel]) -> None:
    model = tiny(name)
    together = generation.greedy(model, PROMPTS, 12, {64, 65, 66, 67, 68})
    alone = [generation.greedy(model, [ids], 12, {64, 65, 66, 67, 68})[0] for ids in PROMPTS]
    assert together == alone
    assert len({tuple(tokens) for tokens, _ in together}) > 1


def test_who_has_ended_is_not_asked_again(tiny: Callable[[str], PreTrainedModel]) -> None:
    """NaN in the row of a finished text is nobody's concern, and forwards end with the last text."""
    model, calls = tiny("llama_gqa"), []
    first = [generation.greedy(model, [ids], 1, set())[0][0][0] for ids in PROMPTS]
    model.register_forward_hook(lambda *_: calls.append(1))
    assert generation.greedy(model, PROMPTS, 12, set(first)) == [([], True)] * len(PROMPTS)
    assert len(calls) == 1


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in CLASSES])
def test_every_decoder_takes_positions_but_those_that_have_none(
    name: str, tiny: Callable[[str], PreTrainedModel]
) -> None:
    assert generation.takes_positions(tiny(name)) is not name.startswith("bloom")
