"""Divergence against torch's own, hand-made distributions, and what must hold of a model and itself."""

import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compresso.errors import DataError, NumericError
from compresso.metrics.divergence import DenseReference, divergence, divergences, reference

VOCABULARY = 50
WINDOWS = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3], [5], [], [8, 9, 7, 9, 3], [2, 3, 8, 4, 6, 2, 6, 4]]
N_POSITIONS = 7 + 1 + 4 + 7


def llama(seed: int, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    return LlamaForCausalLM(
        LlamaConfig(**sizes, vocab_size=vocabulary, max_position_embeddings=16, initializer_range=0.3)
    ).eval()


@pytest.fixture(scope="module")
def dense() -> LlamaForCausalLM:
    return llama(0)


@pytest.fixture(scope="module")
def pruned() -> LlamaForCausalLM:
    return llama(1)


@torch.no_grad()
def log_probs(model: LlamaForCausalLM) -> torch.Tensor:
    """Of each position with a next token, one window at a time."""
    return torch.cat([model(torch.tensor([one])).logits[0, :-1].log_softmax(-1) for one in WINDOWS if len(one) > 1])


def test_equal_to_torch_on_plain_forwards(dense: LlamaForCausalLM, pruned: LlamaForCausalLM) -> None:
    p, q = log_probs(dense), log_probs(pruned)
    each = torch.nn.functional.kl_div(q.double(), p.double(), log_target=True, reduction="none").sum(-1)
    same = (p.argmax(-1) == q.argmax(-1)).double()
    for batch_size in (1, 2, 8):
        kl, agreement = divergence(pruned, reference(dense, WINDOWS, corpus="held", batch_size=batch_size))
        assert (kl.name, kl.unit, kl.n) == ("kl", "nats/token", N_POSITIONS)
        assert (agreement.name, agreement.unit, agreement.n) == ("top1_agreement", "share", N_POSITIONS)
        assert kl.value == pytest.approx(float(each.mean()), rel=1e-5)
        assert kl.stderr == pytest.approx(float(each.std()) / math.sqrt(N_POSITIONS), rel=1e-5)
        assert agreement.value == float(same.mean())
        assert agreement.stderr == pytest.approx(math.sqrt(agreement.value * (1 - agreement.value) / N_POSITIONS))
        assert kl.protocol["chosen"] == "all" and kl.protocol["windows"] == len(WINDOWS)


def test_the_direction_is_from_dense(dense: LlamaForCausalLM, pruned: LlamaForCausalLM) -> None:
    there, back = (
        divergence(pruned, reference(dense, WINDOWS, corpus="held")),
        divergence(dense, reference(pruned, WINDOWS, corpus="held")),
    )
    assert there[0].value != pytest.approx(back[0].value, rel=1e-3)
    assert there[1].value == back[1].value


@pytest.mark.parametrize("max_bytes", [2**20, 4 * VOCABULARY * 5])
def test_a_model_does_not_diverge_from_itself(dense: LlamaForCausalLM, max_bytes: int) -> None:
    for batch_size in (1, 3, 8):
        kl, agreement = divergence(
            dense, reference(dense, WINDOWS, corpus="held", max_bytes=max_bytes, batch_size=batch_size)
        )
        assert (kl.value, kl.stderr, agreement.value) == (0.0, 0.0, 1.0)


def test_hand_made_divergences() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    q = torch.tensor([[0.25, 0.5, 0.25], [0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    found = divergences(p.log(), q.log())
    assert found.dtype == torch.float64
    expected = [0.5 * math.log(2) - 0.25 * math.log(2), math.log(2), 0.0]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-7)
    assert divergences(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]).log()).item() == math.inf


def test_divergences_are_never_below_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(200, 1000, generator=generator).mul(5).log_softmax(-1)
    q = (p + 1e-4 * torch.randn(200, 1000, generator=generator)).log_softmax(-1)
    assert divergences(p, q).min() >= 0
    assert divergences(p, p).abs().max() == 0


def test_where_there_is_no_room_for_all_positions_they_are_spread(
    dense: LlamaForCausalLM, pruned: LlamaForCausalLM
) -> None:
    made = reference(dense, WINDOWS, corpus="held", max_bytes=4 * VOCABULARY * 5 + 3)
    assert made.log_probs.shape == (5, VOCABULARY) and made.n_candidates == N_POSITIONS
    candidates = [[i, j] for i, window in enumerate(WINDOWS) for j in range(len(window) - 1)]
    assert made.places.tolist() == [candidates[i * N_POSITIONS // 5] for i in range(5)]
    at = [candidates.index(place) for place in made.places.tolist()]
    torch.testing.assert_close(made.log_probs, log_probs(dense)[at], rtol=1e-5, atol=1e-5)
    kl, agreement = divergence(pruned, made)
    each = torch.nn.functional.kl_div(
        log_probs(pruned)[at], log_probs(dense)[at], log_target=True, reduction="none"
    ).sum(-1)
    assert kl.value == pytest.approx(float(each.mean()), rel=1e-4)
    assert kl.n == agreement.n == 5
    assert (kl.protocol["chosen"], kl.protocol["of_positions"]) == ("evenly spaced", N_POSITIONS)
    assert not kl.same_protocol(divergence(pruned, reference(dense, WINDOWS, corpus="held"))[0])


def test_a_reference_comes_back_from_disk_as_it_was(
    dense: LlamaForCausalLM, pruned: LlamaForCausalLM, tmp_path: Path
) -> None:
    made = reference(dense, WINDOWS, corpus="held", batch_size=3)
    made.save(tmp_path / "dense.safetensors")
    back = DenseReference.load(tmp_path / "dense.safetensors")
    assert (back.corpus, back.windows, back.n_candidates, back.batch_size) == ("held", made.windows, N_POSITIONS, 3)
    assert torch.equal(back.places, made.places) and torch.equal(back.log_probs, made.log_probs)
    assert [one.value for one in divergence(pruned, back)] == [one.value for one in divergence(pruned, made)]
    assert [path.name for path in tmp_path.iterdir()] == ["dense.safetensors"]


def test_what_is_no_reference_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no tensors here")
    torch_file = tmp_path / "other.safetensors"
    from safetensors.torch import save_file

    save_file({"log_probs": torch.zeros(1, 2)}, torch_file)
    for path, message in [("none", "no readable"), ("text", "no readable"), ("other", "not a dense reference")]:
        with pytest.raises(DataError, match=message):
            DenseReference.load(tmp_path / f"{path}.safetensors")


def test_bad_input_is_refused(dense: LlamaForCausalLM) -> None:
    for windows in ([], [[], [3]]):
        with pytest.raises(DataError, match="no token with a next one"):
            reference(dense, windows, corpus="held")
    with pytest.raises(DataError, match="17 tokens is beyond the model's context of 16"):
        reference(dense, [list(range(17))], corpus="held")
    with pytest.raises(DataError, match="at least 200"):
        reference(dense, WINDOWS, corpus="held", max_bytes=199)
    with pytest.raises(DataError, match="token id 60 is beyond"):
        reference(dense, [[1, 60]], corpus="held")
    with pytest.raises(DataError, match="vocabulary of 51, the dense reference one of 50"):
        divergence(llama(0, 51), reference(dense, WINDOWS, corpus="held"))


def test_numbers_that_are_none_are_refused(dense: LlamaForCausalLM) -> None:
    broken = llama(0)
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.nan)
    with pytest.raises(NumericError, match="predictions on 'held' are NaN"):
        reference(broken, WINDOWS, corpus="held")
    with pytest.raises(NumericError, match="divergence from dense on 'held' is not finite"):
        divergence(broken, reference(dense, WINDOWS, corpus="held"))
