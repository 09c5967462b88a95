"""One prompt and its continuation: what is run, what is read, and which lengths fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, LlamaConfig, MambaConfig, MambaForCausalLM, PreTrainedModel

from compresso.checkpoint.load import load_model
from compresso.checkpoint.source import open_source
from compresso.errors import ArchError, DataError
from compresso.metrics.forward import context_of
from compresso.metrics.timed_generation import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    keeps_last,
    lengths,
    prefill_and_decode,
    prompts,
    stopwatch,
)
from tests.conftest import Ran
from tests.metrics.tiny import tiny


def untimed(work: Any) -> float:
    work()
    return 1.0


def forwards(model: PreTrainedModel) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Filled with the ids and the logits of every forward of the model."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    model.register_forward_hook(
        lambda _, args, given, output: seen.append((given["input_ids"], output.logits)), with_kwargs=True
    )
    return seen


def test_a_turn_reads_the_prompt_and_then_one_greedy_token_a_forward() -> None:
    model = tiny()
    seen = forwards(model)
    ids = prompts(2, 5, 40, seed=0)
    reading, decoding, read = prefill_and_decode(model, ids, 3, untimed)
    seen = seen.copy()
    assert (reading, decoding) == (1.0, 1.0)
    assert [tuple(given.shape) for given, _ in seen] == [(2, 5), (2, 1), (2, 1), (2, 1)]
    assert torch.equal(seen[0][0], ids)
    assert [logits.shape[1] for _, logits in seen] == [1, 1, 1, 1]
    whole = torch.cat([given for given, _ in seen], dim=1)
    with torch.no_grad():
        plain = model(input_ids=whole, use_cache=False).logits[:, 4:]
    torch.testing.assert_close(torch.cat([logits for _, logits in seen], dim=1), plain)
    assert torch.equal(plain[:, :-1].argmax(-1), whole[:, 5:])
    assert read == 2 * 4 * 2 * (2 * 2 * 4) * (6 + 7 + 8) / 3


def test_a_layer_without_attention_reads_no_cache(ran: Ran) -> None:
    result = ran("gate-taylor", layout="native", sets=("stages.gate_taylor.batches=1",), max_steps=1)
    model = load_model(open_source(result.folder), torch.float32)
    counted = result.records["after"]["kv_bytes_per_token"] // 2  # entries a token: two bytes each in the records
    assert prefill_and_decode(model, prompts(1, 4, 1024, seed=0), 1, untimed)[2] == 4 * 5 * counted


def test_a_model_that_cannot_leave_logits_out_is_seen(tiny_folder: Path) -> None:
    class Old(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> None:
            raise AssertionError

    assert keeps_last(load_model(open_source(tiny_folder)))
    assert not keeps_last(Old())  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")
def test_a_model_without_a_key_value_cache_is_refused() -> None:
    model = MambaForCausalLM(
        MambaConfig(vocab_size=16, hidden_size=8, state_size=4, num_hidden_layers=1, expand=1)
    ).eval()
    with pytest.raises(ArchError, match="mamba returns no key/value cache"):
        prefill_and_decode(model, prompts(1, 3, 16, seed=0), 1, untimed)


def test_prompts_are_those_of_the_seed_and_in_the_vocabulary() -> None:
    few, many = prompts(2, 6, 40, seed=3), prompts(4, 6, 40, seed=3)
    assert torch.equal(few, many[:2])
    assert not torch.equal(few, prompts(2, 6, 40, seed=9))
    assert 0 <= int(many.min()) <= int(many.max()) < 40
    assert len({tuple(row) for row in many.tolist()}) == 4


maybe = st.none() | st.integers(1, 400)


@given(st.lists(st.none() | st.integers(2, 600), min_size=1, max_size=3), maybe, maybe)
def test_lengths_are_those_asked_for_and_fit(contexts: list[int | None], prompt: int | None, new: int | None) -> None:
    named = {f"model {i}": context for i, context in enumerate(contexts)}
    most = min((context for context in contexts if context), default=10**9)
    if (prompt or 1) + (new or 1) > most:
        with pytest.raises(DataError, match="lower --prompt-tokens or --new-tokens"):
            lengths(named, prompt, new)
        return
    found = lengths(named, prompt, new)
    assert sum(found) <= most and min(found) >= 1
    assert prompt in (None, found[0]) and new in (None, found[1])
    if most >= (prompt or PROMPT_TOKENS) + (new or NEW_TOKENS) and most >= 4 * NEW_TOKENS:
        assert found == (prompt or PROMPT_TOKENS, new or NEW_TOKENS)


def test_a_refusal_names_the_shortest_context() -> None:
    with pytest.raises(DataError, match="a prompt of 200 tokens and 64 new ones exceed the context of b, 128"):
        lengths({"a": 512, "b": 128, "c": None}, 200, 64)
    with pytest.raises(DataError, match="both must be at least 1"):
        lengths({"a": 512}, 0, 64)
    assert context_of(LlamaConfig(max_position_embeddings=77)) == 77
    assert context_of(GPT2Config(n_positions=55)) == 55
    assert context_of(MambaConfig()) is None


def test_the_clock_of_the_processor_does_the_work_once() -> None:
    done: list[int] = []
    assert stopwatch(torch.device("cpu"))(lambda: done.append(1)) >= 0
    assert done == [1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA: no device")
def test_the_clock_of_a_gpu_waits_for_its_work() -> None:
    model, device = tiny().cuda(), torch.device("cuda")
    reading, decoding, read = prefill_and_decode(model, prompts(2, 5, 40, seed=0).to(device), 3, stopwatch(device))
    assert reading > 0 and decoding > 0
    assert read == 2 * 4 * 2 * (2 * 2 * 4) * 7
