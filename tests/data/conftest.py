"""Small tokenizers of the kinds that models ship, built in memory."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "###User Instruction:\nName a colour.\n\n### Response:red is a colour",
    "### Response:\n\nred\n### Response:'tis ### Response: red :a :b :re",
    "Response: blue. Response: one. Response: it. Response: Name. Response: User.",
    "The cat sat on the mat, and the dog was red and blue and green.",
]
SPECIALS = ["<unk>", "<s>", "</s>"]


def _finish(tokenizer: Tokenizer, bos: bool, adds_bos: bool, **named: str) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **({"bos_token": "<s>"} if bos else {}),
        eos_token="</s>",
        unk_token="<unk>",
        **named,
    )


def byte_level(
    use_regex: bool, bos: bool = True, adds_bos: bool = True, trims: bool = False
) -> PreTrainedTokenizerFast:
    """Byte-level BPE; without the regex, tokens merge across words, ':' and line breaks; `trims` leaves white space out
    of offsets.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex, trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if trims:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return _finish(tokenizer, bos, adds_bos)


def metaspace(scheme: str) -> PreTrainedTokenizerFast:
    """A sentencepiece-like BPE with byte fallback: "legacy" prepends ▁ to every piece of text, "first" only to the
    first.
    """
    pieces = Tokenizer(models.BPE(unk_token="<unk>"))
    pieces.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=[*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
    )
    pieces.train_from_iterator([text.replace("\n", "") for text in CORPUS], trainer)
    model = json.loads(pieces.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=model["vocab"], merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    if scheme == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _finish(tokenizer, bos=True, adds_bos=True)


TOKENIZERS = {
    "byte-level": lambda: byte_level(use_regex=True),
    "byte-level, merging across words": lambda: byte_level(use_regex=False),
    "byte-level, merging across words, trimmed offsets": lambda: byte_level(
        use_regex=False, adds_bos=False, trims=True
    ),
    "byte-level, bos not added": lambda: byte_level(use_regex=True, adds_bos=False),
    "byte-level, no bos": lambda: byte_level(use_regex=True, bos=False, adds_bos=False),
    "metaspace, legacy": lambda: metaspace("legacy"),
    "metaspace, first": lambda: metaspace("first"),
}
_BUILT: dict[str, PreTrainedTokenizerFast] = {}


@pytest.fixture(params=list(TOKENIZERS))
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """Each kind of tokenizer, without a chat template."""
    name = request.param
    if name not in _BUILT:
        _BUILT[name] = TOKENIZERS[name]()
    _BUILT[name].chat_template = None
    return _BUILT[name]


@pytest.fixture
def plain_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer for tests in which the kind does not matter."""
    return byte_level(use_regex=True)


@pytest.fixture
def write(tmp_path: Path):
    """Write bytes or text to a file of the given name and return its path."""

    def _write(name: str, content: bytes | str) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return _write
