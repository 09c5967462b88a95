"""Eager attention for a while, also where layers have a config of their own."""

import copy

from tests.edit.test_quantised import model_of

from compresso.edit.eager import attention_of, eager


def test_attention_is_eager_within_the_context_alone() -> None:
    model, other = model_of("gpt2"), model_of("bert")
    own = copy.deepcopy(model.config)
    attention = model.get_submodule("transformer.h.1.attn")
    attention.config = own  # type: ignore[assignment]  # as of a layer with fewer heads
    before = [attention_of(model), attention_of(other)]
    try:
        with eager(model, other):
            assert attention_of(model) == attention_of(other) == own._attn_implementation == "eager"
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert [attention_of(model), attention_of(other)] == before and own._attn_implementation == before[0] == "sdpa"
