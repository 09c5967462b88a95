"""Perplexity against closed forms, a plain forward for every single token, and losses that were measured elsewhere."""

import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compresso.data import nano
from compresso.data.world import documents
from compresso.errors import DataError, NumericError
from compresso.metrics.corpora import corpus
from compresso.metrics.perplexity import PRESETS, PerplexityProtocol, PerplexityResult, every_token, perplexity
from compresso.metrics.record import Environment, Measurement
from compresso.metrics.windows import text_windows

LOCAL = os.environ.get("COMPRESSO_DATA")
TOKENIZER = AutoTokenizer.from_pretrained(nano.path())
TEXTS = list(documents(12, 4))
HERE = Environment.here(dtype=torch.float32)


def llama(context: int = 512) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = LlamaConfig(**sizes, vocab_size=len(TOKENIZER), max_position_embeddings=context, initializer_range=0.1)
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return llama()


@pytest.fixture(scope="module")
def blank() -> LlamaForCausalLM:
    """A model that takes all tokens as equally likely."""
    made = llama(2048)
    with torch.no_grad():
        made.lm_head.weight.zero_()
    return made


def one_by_one(model: LlamaForCausalLM, windows) -> list[list[float]]:
    """Nats of each predicted token of each window, from a forward over nothing but what stands before it."""
    found = []
    for window in windows:
        found.append([])
        for place in range(window.first, len(window.ids)):
            with torch.no_grad():
                chances = model(torch.tensor([window.ids[:place]])).logits[0, -1].double().log_softmax(-1)
            found[-1].append(-chances[window.ids[place]].item())
    return found


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    "fields",
    [
        {"joining": "blank line", "bos": "tokenizer", "averaging": "windows"},
        {"joining": "tokens", "stride": 5, "remainder": "kept"},
        {"joining": "tokens", "bos": "window", "remainder": "kept", "averaging": "windows"},
        {"joining": "separate", "bos": "start", "remainder": "kept", "max_windows": 1},
    ],
)
def test_equal_to_one_token_at_a_time(model: LlamaForCausalLM, fields: dict, batch_size: int) -> None:
    protocol = PerplexityProtocol(**{"corpus": "world", "split": "fresh", "seq_len": 16, "documents": 3} | fields)
    windows = text_windows(TOKENIZER, TEXTS[:3], protocol)
    nats = one_by_one(model, windows)
    result = perplexity(model, TOKENIZER, iter(TEXTS), protocol, batch_size=batch_size)
    assert (result.protocol, result.n_texts, result.n_windows) == (protocol, 3, len(windows))
    assert result.n_tokens == sum(map(len, nats))
    assert result.nats == pytest.approx(sum(map(sum, nats)), rel=1e-5)
    means = [sum(one) / len(one) for one in nats]
    by_token = result.nats / result.n_tokens
    assert result.loss == pytest.approx(
        sum(means) / len(means) if protocol.averaging == "windows" else by_token, rel=1e-5
    )
    assert result.value == math.exp(result.loss)
    assert result.n_bytes == sum(window.n_bytes or 0 for window in windows)
    assert result.by_byte == pytest.approx(math.exp(result.nats / result.n_bytes))


def test_no_overlap_and_nothing_left_out_is_the_plain_loss_of_each_block(model: LlamaForCausalLM) -> None:
    stream: list[int] = []
    for text in TEXTS:
        stream += [*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id]
    total, n = 0.0, 0
    for begin in range(0, len(stream), 64):
        block = torch.tensor([stream[begin : begin + 64]])
        with torch.no_grad():
            total += model(block, labels=block).loss.item() * (block.shape[1] - 1)
        n += block.shape[1] - 1
    result = perplexity(model, TOKENIZER, TEXTS, every_token("world", "fresh", 64), batch_size=4)
    assert (result.n_tokens, result.protocol.seq_len) == (n, 64)
    assert result.loss == pytest.approx(total / n, rel=1e-5)


def test_the_batch_size_does_not_change_the_number(model: LlamaForCausalLM) -> None:
    for protocol in (
        every_token("world", "fresh", 64),
        replace(PRESETS["llm-pruner"], joining="separate", remainder="kept"),
    ):
        results = [perplexity(model, TOKENIZER, TEXTS, protocol, batch_size=size) for size in (1, 2, 7, 100)]
        for other in results[1:]:
            assert other.loss == pytest.approx(results[0].loss, rel=1e-6)
            assert other.stderr == pytest.approx(results[0].stderr, rel=1e-4)
            assert replace(other, loss=0.0, stderr=None, nats=0.0) == replace(
                results[0], loss=0.0, stderr=None, nats=0.0
            )


@pytest.mark.parametrize("name", PRESETS)
def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(blank: LlamaForCausalLM, name: str) -> None:
    result = perplexity(blank, TOKENIZER, documents(90, 1), PRESETS[name])
    assert result.value == pytest.approx(len(TOKENIZER), rel=1e-5)
    assert result.n_tokens == result.n_windows * (PRESETS[name].seq_len - 1)
    assert result.by_byte == pytest.approx(len(TOKENIZER) ** (result.n_tokens / result.n_bytes), rel=1e-5)
    assert result.stderr is None or result.stderr == pytest.approx(0, abs=1e-6)


def test_bytes_compare_models_with_different_tokenizers(blank: LlamaForCausalLM) -> None:
    """A guess costs the same for each token, so one token a byte makes the vocabulary the perplexity by byte, and fewer
    make it less.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE(vocab={one: i for i, one in enumerate(alphabet)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    whole = PerplexityProtocol("world", "fresh", "separate", 2048, bos="window", remainder="kept")
    few = perplexity(blank, TOKENIZER, TEXTS, whole)
    many = perplexity(blank, PreTrainedTokenizerFast(tokenizer_object=bytewise), TEXTS, replace(whole, bos="none"))
    n_bytes = sum(len(text.encode()) for text in TEXTS)
    assert (few.n_bytes, many.n_bytes, many.n_tokens) == (n_bytes, n_bytes - len(TEXTS), n_bytes - len(TEXTS))
    assert many.by_byte == pytest.approx(len(TOKENIZER), rel=1e-5)
    assert few.by_byte == pytest.approx(len(TOKENIZER) ** (few.n_tokens / n_bytes), rel=1e-5)
    assert few.by_byte < many.by_byte and few.value == pytest.approx(many.value)


def test_the_standard_error_is_that_of_independent_windows(model: LlamaForCausalLM) -> None:
    protocol = PerplexityProtocol("world", "fresh", "tokens", 16, documents=4)
    nats = one_by_one(model, text_windows(TOKENIZER, TEXTS[:4], protocol))
    means = torch.tensor([sum(one) / len(one) for one in nats])
    result = perplexity(model, TOKENIZER, TEXTS, protocol, batch_size=8)
    assert result.stderr == pytest.approx(float(means.std() / math.sqrt(len(means))), rel=1e-4)
    assert perplexity(model, TOKENIZER, TEXTS, replace(protocol, max_windows=1)).stderr is None


def test_measurements_carry_the_protocol(model: LlamaForCausalLM) -> None:
    result = perplexity(model, TOKENIZER, TEXTS, every_token("world", "fresh", 64))
    by_token, by_byte = result.measurements(HERE, remark="Twelve texts.")
    assert (by_token.name, by_token.value, by_token.n) == ("world/perplexity", result.value, result.n_tokens)
    assert (by_byte.name, by_byte.value, by_byte.n) == ("world/byte_perplexity", result.by_byte, result.n_bytes)
    assert by_token.unit == by_byte.unit == "1" and by_token.how == "measured" and by_token.remark == "Twelve texts."
    assert by_token.stderr == pytest.approx(result.value * result.stderr)
    decided = result.protocol.settings() | {"documents": 12, "tokens": result.n_tokens}
    assert decided.items() <= by_token.protocol.items()
    assert Measurement.model_validate_json(by_token.model_dump_json()) == by_token


def test_other_tokens_are_another_protocol_except_by_byte(model: LlamaForCausalLM) -> None:
    whole = every_token("world", "fresh", 512)
    plain = AutoTokenizer.from_pretrained(nano.path())
    plain.eos_token = None
    here, there = (perplexity(model, one, TEXTS, whole).measurements(HERE) for one in (TOKENIZER, plain))
    assert not here[0].same_protocol(there[0])
    assert here[1].same_protocol(there[1])
    other = perplexity(model, TOKENIZER, TEXTS[1:], whole).measurements(HERE)
    assert not here[1].same_protocol(other[1])


def test_there_is_no_number_without_its_protocol(model: LlamaForCausalLM) -> None:
    result = perplexity(model, TOKENIZER, TEXTS, every_token("world", "fresh", 64))
    fields = {name: getattr(result, name) for name in PerplexityResult.__dataclass_fields__ if name != "protocol"}
    with pytest.raises(TypeError, match="protocol"):
        PerplexityResult(**fields)
    by_token, _ = result.measurements(HERE)
    for without in ({}, None):
        with pytest.raises(ValidationError, match="protocol"):
            Measurement.model_validate(by_token.model_dump() | {"protocol": without})


def test_a_tokenizer_that_does_not_tell_its_characters_gives_no_value_by_byte(model: LlamaForCausalLM) -> None:
    class Silent:
        is_fast = False
        bos_token_id, eos_token_id = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id

        def __call__(self, texts, return_offsets_mapping, **options):
            assert not return_offsets_mapping
            return TOKENIZER(texts, **options)

    result = perplexity(model, Silent(), TEXTS, every_token("world", "fresh", 64))  # type: ignore[arg-type]
    assert result.loss == pytest.approx(perplexity(model, TOKENIZER, TEXTS, every_token("world", "fresh", 64)).loss)
    (only,) = result.measurements(HERE, remark="Twelve texts.")
    assert result.by_byte is None and only.name == "world/perplexity"
    assert only.remark is not None and only.remark.startswith("Twelve texts. No value by byte")


def test_the_mode_of_the_model_is_left_as_it_was(model: LlamaForCausalLM) -> None:
    for mode in (True, False):
        model.train(mode)
        perplexity(model, TOKENIZER, TEXTS[:2], every_token("world", "fresh", 64))
        assert model.training is mode


def test_bad_input_is_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(DataError, match="2048 tokens at once, the model was made for 512"):
        perplexity(model, TOKENIZER, TEXTS, PRESETS["sparsegpt"])
    with pytest.raises(
        DataError, match=r"corpus 'wikitext2': 1 texts make \d tokens in a row.*wanted 128 for a full window"
    ):
        perplexity(model, TOKENIZER, ["A short text."], PRESETS["llm-pruner"])
    for texts in ([], ["", ""]):
        with pytest.raises(DataError, match=r"make 0 tokens in a row.*wanted 2\."):
            perplexity(
                model, TOKENIZER, texts, PerplexityProtocol("held", "all", "tokens", 8, remainder="kept", bos="none")
            )
    with pytest.raises(DataError, match="batch_size=0"):
        perplexity(model, TOKENIZER, TEXTS, PRESETS["llm-pruner"], batch_size=0)


def test_a_tokenizer_of_another_model_is_refused(model: LlamaForCausalLM) -> None:
    small = LlamaForCausalLM(LlamaConfig(**model.config.to_diff_dict() | {"vocab_size": 300}))
    with pytest.raises(DataError, match="beyond the model's vocabulary of 300"):
        perplexity(small, TOKENIZER, TEXTS, every_token("world", "fresh", 64))


def test_a_loss_that_is_no_number_is_refused() -> None:
    broken = llama()
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.nan)
    with pytest.raises(NumericError, match="loss on corpus 'world' is nan"):
        perplexity(broken, TOKENIZER, TEXTS, every_token("world", "fresh", 64))
    huge = replace(perplexity(llama(), TOKENIZER, TEXTS, every_token("world", "fresh", 64)), loss=1000.0)
    with pytest.raises(NumericError, match="1000 nats"):
        _ = huge.value


@pytest.mark.slow
@pytest.mark.skipif(not LOCAL, reason="COMPRESSO_DATA: no folder with small trained models")
@pytest.mark.parametrize(
    ("name", "context", "file", "n_stories", "loss", "n_tokens"),
    [
        ("stories260K", 512, "tinystories_sample", 100, 1.4076, 37_072),
        ("stories260K", 512, "tinystories_v2_valid_5", 5, 1.2664, 1_804),
        ("babyllama-tok361", 256, "tinystories_sample", 100, 0.6332, 25_500),
        ("babyllama-tok361", 256, "tinystories_v2_valid_5", 5, 0.5592, 1_275),
    ],
)
def test_losses_that_were_measured_elsewhere(
    name: str, context: int, file: str, n_stories: int, loss: float, n_tokens: int
) -> None:
    """By token, BOS first, the first window of each text: the table beside the local copies, whose last digit is
    rounded.
    """
    folder = Path(str(LOCAL), "models", name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = corpus(Path(str(LOCAL), "datasets", "text", f"{file}.jsonl.gz")).texts
    first = PerplexityProtocol(
        file, "all", "separate", context, bos="start", remainder="kept", documents=n_stories, max_windows=1
    )
    result = perplexity(model, AutoTokenizer.from_pretrained(folder), texts, first, batch_size=8)
    assert result.n_tokens == n_tokens
    assert result.loss == pytest.approx(loss, abs=6e-5)
