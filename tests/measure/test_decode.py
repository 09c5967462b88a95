"""Decode measurement: what it counts and that every model gets its turns; never how fast."""

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from compresso.measure.decode import bytes_per_token, decode_speeds


def tiny(tied: bool, channels: int = 24) -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
    return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=channels, tie_word_embeddings=tied)).eval()


def test_a_token_reads_every_matrix_once_and_one_row_of_an_untied_embedding() -> None:
    untied, tied = tiny(False), tiny(True)
    total = sum(p.numel() for p in untied.parameters())
    assert bytes_per_token(untied) == 4 * (total - 40 * 16)
    assert bytes_per_token(tied) == 4 * sum(p.numel() for p in tied.parameters()) == bytes_per_token(untied)
    assert bytes_per_token(tied.bfloat16()) == bytes_per_token(untied) // 2


def test_every_model_is_measured_in_every_round() -> None:
    result = decode_speeds({"a": tiny(True), "b": tiny(True, 8)}, prompt_tokens=4, new_tokens=3, rounds=2)
    assert list(result) == ["a", "b"]
    for speed in result.values():
        assert speed.rounds == 2
        assert speed.new_tokens == 3
        assert 0 < speed.lowest <= speed.tokens_per_second <= speed.highest
    assert result["a"].bytes_per_token - result["b"].bytes_per_token == 4 * 2 * 3 * 16 * 16


@pytest.mark.parametrize("rounds", [1, 3])
def test_the_warm_up_round_is_not_counted(rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import compresso.measure.decode as decode

    calls: list[int] = []

    def fake(*_: object) -> float:
        calls.append(1)
        return 1000.0 if len(calls) == 1 else 0.5

    monkeypatch.setattr(decode, "_decode_seconds", fake)
    assert decode.decode_speeds({"a": tiny(True)}, new_tokens=4, rounds=rounds)["a"].lowest == 8.0
    assert len(calls) == rounds + 1
