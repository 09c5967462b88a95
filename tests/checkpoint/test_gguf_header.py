"""GGUF files that cannot be read: each is refused in one line that says why, and before memory is taken for its claims.

Files are made here byte by byte, independently of the package and of the gguf library.
"""

import math
import random
import re
import shutil
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compresso.checkpoint import gguf_folder, gguf_package
from compresso.checkpoint.gguf_folder import describe_gguf
from compresso.checkpoint.gguf_header import read_gguf_header
from compresso.checkpoint.load import load_model
from compresso.checkpoint.source import open_source
from compresso.checkpoint.tokenizer import load_tokenizer
from compresso.errors import CheckpointError, CompressoError, NumericError, ResourceError

pytest.importorskip("gguf", reason="gguf: not installed")

WIDTH, ROWS = 8, 6
TOKENS = ["<unk>", "<s>", "</s>", "\u2581", "a", "\u2581a"]
FIELDS: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": WIDTH,
    "llama.feed_forward_length": 4,
    "llama.attention.head_count": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -2.0, -3.0, -1.0],
    "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
}
SHAPES = {
    "token_embd.weight": (ROWS, WIDTH),
    "output_norm.weight": (WIDTH,),
    "blk.0.attn_norm.weight": (WIDTH,),
    "blk.0.ffn_norm.weight": (WIDTH,),
    **{f"blk.0.attn_{part}.weight": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")},
    "blk.0.ffn_gate.weight": (4, WIDTH),
    "blk.0.ffn_up.weight": (4, WIDTH),
    "blk.0.ffn_down.weight": (WIDTH, 4),
}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def typed(value: Any) -> bytes:
    """A value's type and bytes."""
    match value:
        case bytes():
            return value
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<Ii" if value < 0 else "<IQ", 5 if value < 0 else 10, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + text(value)
        case _:
            inner = [typed(one) for one in value]
            return struct.pack("<I", 9) + inner[0][:4] + struct.pack("<Q", len(inner)) + b"".join(i[4:] for i in inner)


def file_of(
    fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], kind: int = 0, version: int = 3, cut: int = 0
) -> bytes:
    """A GGUF file whose tensors are float32 zeros but for the norms, which hold whatever bytes come."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(shapes), len(fields))
    for key, value in fields.items():
        head += text(key) + typed(value)
    at, body = 0, b""
    for name, shape in shapes.items():
        head += text(name) + struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", one) for one in shape[::-1])
        head += struct.pack("<IQ", kind, at)
        size = 4
        for one in shape:
            size *= one
        body += bytes(size) + bytes(-size % 32)
        at = len(body)
    whole = head + bytes(-len(head) % 32) + body
    return whole[: len(whole) - cut]


def changed(**more: Any) -> dict[str, Any]:
    """The fields, with `__` for dots; None removes one."""
    given = {key.replace("__", "."): value for key, value in more.items()}
    return {key: value for key, value in (FIELDS | given).items() if value is not None}


def shaped(**more: tuple[int, ...] | None) -> dict[str, tuple[int, ...]]:
    given = {key.replace("__", "."): value for key, value in more.items()}
    return {key: value for key, value in (SHAPES | given).items() if value is not None}


def opened(tmp_path: Path, data: bytes, name: str = "m.gguf") -> str:
    """What is said of a file."""
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        open_source(tmp_path / name)
    said = str(caught.value)
    assert "\n" not in said and name in said and len(said) < 600
    assert "compresso-" not in said  # the temporary folder is nobody's to look into
    return said


def test_the_file_that_the_others_are_changed_from_opens(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(file_of(FIELDS, SHAPES))
    source = open_source(tmp_path / "m.gguf")
    assert source.config.num_hidden_layers == 1
    assert load_tokenizer(source)("a a")["input_ids"] == [1, 5, 5]


def claims(what: bytes) -> bytes:
    """A file whose only field is `x` with these bytes of type and value."""
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("x") + what


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", r"the magic needs 4 bytes where 0 are left: it is truncated"),
        (b"PK\x03\x04" + bytes(40), r"it begins with b'PK\\x03\\x04' where a GGUF file begins with b'GGUF'"),
        (b"GGUF" + struct.pack(">IQQ", 3, 1, 1), "it is big-endian, and little-endian files are read"),
        (b"GGUF" + struct.pack("<IQQ", 1, 1, 1), "it is of GGUF version 1; versions 2 and 3 are read"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 1), r"it claims \d+ tensors; at most 100000 are read"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 2**60), r"it claims \d+ fields; at most 10000 are read"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 2**62), r"a field's name claims \d+ bytes; at most 1024"),
        (claims(struct.pack("<IQ", 8, 2**62)), r"'x' claims \d+ bytes; at most 8000000 are read"),
        (claims(struct.pack("<IIQ", 9, 4, 2**62)), r"'x' claims \d+ entries; at most 4194304 are read"),
        (claims(struct.pack("<IIQ", 9, 4, 2**20)), r"'x' needs 4194304 bytes where 0 are left: it is truncated"),
        (claims(struct.pack("<IIQ", 9, 8, 2**20)), "'x' claims 1048576 texts where 0 bytes are left"),
        (claims(struct.pack("<IIQ", 9, 9, 1)), "'x' is a list of type 9; numbers and texts are read"),
        (claims(struct.pack("<I", 77)), "'x' has type 77, which GGUF does not know"),
        (claims(struct.pack("<IQ", 8, 1) + b"\xff"), "'x' is not UTF-8"),
        (file_of(FIELDS, SHAPES, cut=1), r"ends at byte \d+ of \d+: the file is truncated"),
        (file_of(FIELDS, SHAPES)[:700], "it is truncated"),
        (file_of(changed(general__alignment=0), SHAPES), "general.alignment is 0; a power of two is wanted"),
        (file_of(FIELDS, shaped(token_embd__weight=(1, 1, 1, 1, 1))), "has 5 dimensions; 1 to 4 are read"),
        (file_of(FIELDS, {**SHAPES, "x": (0, 8)}), r"the tensor 'x' has the shape \[0, 8\]"),
        (file_of(FIELDS, SHAPES, kind=8), "has rows of 8, and Q8_0 holds multiples of 32"),
        (file_of(FIELDS, SHAPES, kind=24), "as I8, which the gguf package does not dequantise"),
        (file_of(FIELDS, SHAPES, kind=99), "as type 99, which the gguf package does not dequantise"),
    ],
)
def test_damaged_or_hostile(data: bytes, said: str, tmp_path: Path) -> None:
    assert re.search(said, opened(tmp_path, data))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"general__architecture": None}, "has no general.architecture, which is needed"),
        (
            {"general__architecture": "mamba"},
            "holds the architecture 'mamba'; read are llama, deci, qwen2, qwen3, gemma",
        ),
        ({"general__architecture": 7}, "has 7 as general.architecture; a text is wanted"),
        ({"general__type": "adapter"}, "is no model but of type 'adapter'"),
        ({"split__count": 3}, "is one part of a split GGUF"),
        ({"llama__expert_count": 8}, "is a mixture of experts"),
        ({"llama__logit_scale": 0.5}, "scales its logits"),
        ({"llama__block_count": 10**12}, "says that it has 1000000000000 layers, and holds 11 tensors"),
        ({"llama__block_count": 2}, r"missing: model\.layers\.1\.input_layernorm\.weight"),
        ({"llama__block_count": -1}, "has -1 as llama.block_count; a whole number that is not negative is wanted"),
        ({"llama__embedding_length": None}, "has no llama.embedding_length, which is needed"),
        ({"llama__embedding_length": 16}, r"says embedding_length 16, and its token_embd\.weight is \[6, 8\]"),
        ({"llama__feed_forward_length": 2**40}, "intermediate_size is 1,099,511,627,776; at most 262,144"),
        ({"llama__feed_forward_length": 8}, r"wrong shape: blk\.0\.ffn_down\.weight \[8, 4\] instead of \[8, 8\]"),
        ({"llama__attention__head_count": 0}, r"unexpected: blk\.0\.attn_k\.weight, blk\.0\.attn_norm\.weight"),
        ({"llama__attention__head_count": 3}, r"wrong shape: blk\.0\.attn_k\.weight \[8, 8\] instead of \[6, 8\]"),
        ({"llama__attention__head_count": [2, 2]}, "has 2 values in llama.attention.head_count; 1, one a layer"),
        ({"llama__attention__head_count_kv": 3}, "has 2 heads for 3 key/value heads in layer 0"),
        ({"llama__attention__value_length": 2}, "has keys and values of different sizes"),
        ({"llama__attention__layer_norm_rms_epsilon": float("nan")}, "a number is wanted"),
        ({"llama__context_length": 2**40}, "max_position_embeddings is 1,099,511,627,776; at most"),
        ({"llama__vocab_size": 7}, r"says vocab_size 7, and its token_embd\.weight has 6 rows"),
        ({"llama__rope__dimension_count": 2}, "turns 2 of the 4 dimensions of a head"),
        ({"llama__rope__freq_base": -1.0}, "has the rope base -1 and factor 1; positive numbers are wanted"),
        ({"llama__rope__scaling__type": "longrope"}, "scales its rope by 'longrope'"),
        ({"tokenizer__ggml__model": "bert"}, r"has a tokenizer of kind 'bert'; gpt2 \(byte-level BPE\) and llama"),
        ({"tokenizer__ggml__model": "gpt2"}, r"splits texts as 'default' \(tokenizer\.ggml\.pre\), which is not known"),
        (
            {"tokenizer__ggml__model": "gpt2", "tokenizer__ggml__pre": "gpt-2"},
            "has no tokenizer.ggml.merges",
        ),
        (
            {
                "tokenizer__ggml__model": "gpt2",
                "tokenizer__ggml__pre": "gpt-2",
                "tokenizer__ggml__merges": ["q x"],
            },
            "has a tokenizer that cannot be built",
        ),
        ({"tokenizer__ggml__tokens": None}, "has no tokenizer.ggml.tokens, which is needed"),
        ({"tokenizer__ggml__tokens": [*TOKENS, "b"]}, "has 7 tokens for an embedding of 6 rows"),
        ({"tokenizer__ggml__tokens": [*TOKENS[:5], "a"]}, "has the token 'a' twice, as 4 and 5"),
        ({"tokenizer__ggml__tokens": 3}, "has something else in tokenizer.ggml.tokens than a list"),
        ({"tokenizer__ggml__scores": [1.0]}, "has 1 scores for 6 tokens"),
        ({"tokenizer__ggml__token_type": [1]}, "has 1 types for 6 tokens"),
        ({"tokenizer__ggml__eos_token_id": 6}, "has 6 as tokenizer.ggml.eos_token_id, and 6 tokens"),
        ({"tokenizer__ggml__add_bos_token": 1}, "has 1 as tokenizer.ggml.add_bos_token; true or false is wanted"),
        ({"tokenizer__chat_template": 1}, "has 1 as tokenizer.chat_template; a text is wanted"),
    ],
)
def test_fields_that_make_no_model(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert re.search(said, opened(tmp_path, file_of(changed(**fields), SHAPES)))


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"token_embd__weight": None}, "says embedding_length 8, and its token_embd.weight is none"),
        ({"blk__0__attn_q__weight": None}, r"missing: model\.layers\.0\.self_attn\.q_proj\.weight"),
        ({"blk__0__attn_q__weight": (4, 8)}, r"blk\.0\.attn_q\.weight \[4, 8\] instead of \[8, 8\]"),
        ({"blk__0__attn_q__bias": (8,)}, r"unexpected: blk\.0\.attn_q\.bias"),
        ({"blk__7__attn_q__weight": (8, 8)}, r"unexpected: blk\.7\.attn_q\.weight"),
        ({"blk__0__ffn_gate_exps__weight": (8, 8)}, r"holds tensors that llama has not: blk\.0\.ffn_gate_exps\.weight"),
        ({"rope_freqs__weight": (9,)}, r"has rope_freqs\.weight \[9\]; positive numbers \[2\] are wanted"),
    ],
)
def test_tensors_that_are_not_the_models(shapes: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert re.search(said, opened(tmp_path, file_of(FIELDS, shaped(**shapes))))


def test_names_and_bytes_that_are_claimed_twice(tmp_path: Path) -> None:
    one = file_of(FIELDS, SHAPES)
    twice = one.replace(text("blk.0.attn_k.weight"), text("blk.0.attn_q.weight"))
    assert "the tensor 'blk.0.attn_q.weight' is there twice" in opened(tmp_path, twice)
    again = one.replace(text("llama.context_length"), text("llama.block_count").replace(b"", b"", 1))
    assert "cannot be read" in opened(tmp_path, again)
    where = struct.pack("<IQ", 0, 0), one.index(text("output_norm.weight"))
    after = where[1] + len(text("output_norm.weight")) + 12
    over = one[:after] + where[0] + one[after + 12 :]
    assert "overlaps the one before it" in opened(tmp_path, over)


def test_one_part_of_several(tmp_path: Path) -> None:
    said = opened(tmp_path, file_of(FIELDS, SHAPES), "big-00001-of-00002.gguf")
    assert "is one part of a split GGUF. Join them first: llama-gguf-split --merge" in said


def test_another_file_is_told_what_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(20))
    with pytest.raises(CheckpointError, match=r"is a file; give the folder it lies in, a GGUF file, or a"):
        open_source(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"absent\.gguf does not exist"):
        open_source(str(tmp_path / "absent.gguf"))
    with pytest.raises(CheckpointError, match=r"absent\.gguf does not exist"):
        open_source("absent.gguf")  # and the hub is not asked


def test_without_a_tokenizer_it_opens_and_says_so_when_one_is_needed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bare = {key: value for key, value in FIELDS.items() if not key.startswith("tokenizer.")}
    (tmp_path / "m.gguf").write_bytes(file_of(bare, SHAPES))
    source = open_source(tmp_path / "m.gguf")
    assert "m.gguf: the file holds no tokenizer" in caplog.text
    with pytest.raises(CheckpointError, match=r"m\.gguf holds no tokenizer\. Give a GGUF with one"):
        load_tokenizer(source)


def test_without_the_package_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(file_of(FIELDS, SHAPES))
    gguf_package.kind_of.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        CheckpointError, match=r"reading GGUF needs the gguf package; pip install gguf \(the extra comp"
    ):
        open_source(tmp_path / "m.gguf")


def test_runs_of_spaces_are_pieces(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", "\u2581", "a", "  "]  # as Gemma files have them
    fields = changed(
        tokenizer__ggml__tokens=tokens,
        tokenizer__ggml__token_type=[2, 3, 3, 1, 1, 4],
        tokenizer__ggml__scores=[0.0, 0.0, 0.0, -2.0, -3.0, -1000.0],
        tokenizer__ggml__add_space_prefix=False,
        tokenizer__ggml__add_bos_token=False,
    )
    (tmp_path / "m.gguf").write_bytes(file_of(fields, SHAPES))
    tokenizer = load_tokenizer(open_source(tmp_path / "m.gguf", weights=False))
    assert tokenizer("a  a a")["input_ids"] == [4, 5, 4, 3, 4]
    assert tokenizer.decode([4, 5, 4, 3, 4]) == "a  a a"


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "falcon3", "qwen2", "deepseek-r1-qwen", "tekken"])
def test_every_known_way_to_split_gives_a_tokenizer(name: str, tmp_path: Path) -> None:
    fields = changed(
        tokenizer__ggml__model="gpt2",
        tokenizer__ggml__pre=name,
        tokenizer__ggml__tokens=["<unk>", "<s>", "</s>", "a", "b", "ab"],
        tokenizer__ggml__token_type=[3, 3, 3, 1, 1, 1],
        tokenizer__ggml__merges=["a b"],
        tokenizer__ggml__scores=None,
    )
    (tmp_path / "m.gguf").write_bytes(file_of(fields, SHAPES))
    begins = [1] if name in ("llama-bpe", "falcon3", "tekken") else []  # as llama.cpp does where the file is silent
    tokenizer = load_tokenizer(open_source(tmp_path / "m.gguf", weights=False))
    assert tokenizer("aab</s>b")["input_ids"] == [*begins, 3, 5, 2, 4]


def test_the_first_gemma_is_read(tmp_path: Path) -> None:
    fields = {
        key.replace("llama.", "gemma.", 1): value for key, value in changed(general__architecture="gemma").items()
    }
    fields["gemma.attention.key_length"] = fields["gemma.attention.value_length"] = 4
    (tmp_path / "m.gguf").write_bytes(file_of({**fields, "general.architecture": "gemma"}, SHAPES))
    model = load_model(open_source(tmp_path / "m.gguf"))
    assert model.config.model_type == "gemma" and model.config.hidden_activation in (None, "gelu_pytorch_tanh")
    assert bool((model.model.norm.weight == -1).all())  # the 1 that its code adds
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_is_not_finite_is_named(tmp_path: Path) -> None:
    data, path = bytearray(file_of(FIELDS, SHAPES)), tmp_path / "m.gguf"
    path.write_bytes(data)
    begin = read_gguf_header(path).tensors["blk.0.ffn_up.weight"].begin
    data[begin : begin + 4] = struct.pack("<f", math.nan)
    path.write_bytes(data)
    with pytest.raises(NumericError, match=r"'model\.layers\.0\.mlp\.up_proj\.weight' holds NaN or Inf"):
        load_model(open_source(path))


def test_a_full_disk_is_said_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(file_of(FIELDS, SHAPES))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(ResourceError, match=r"m\.gguf needs 0\.0 GB of temporary files .* set TMPDIR to a folder"):
        open_source(tmp_path / "m.gguf")


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(file_of(FIELDS, SHAPES))
    described = describe_gguf(path)
    path.write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="has become shorter while it was read"):
        described.write()


def test_shards_and_pieces_hold_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(file_of(FIELDS, SHAPES))
    dice = random.Random(1)
    for name in ("one", "many"):
        (tmp_path / f"{name}.gguf").write_bytes(data)
    tensors = read_gguf_header(tmp_path / "one.gguf").tensors
    for tensor in tensors.values():
        count = (tensor.end - tensor.begin) // 4
        data[tensor.begin : tensor.end] = struct.pack(f"<{count}f", *(dice.gauss(0, 1) for _ in range(count)))
    states = []
    for name in ("one", "many"):
        (tmp_path / f"{name}.gguf").write_bytes(data)
        states.append(load_model(open_source(tmp_path / f"{name}.gguf")).state_dict())
        monkeypatch.setattr(gguf_folder, "_SHARD_BYTES", 300)
        monkeypatch.setattr(gguf_folder, "_CHUNK", 16)
    folder = open_source(tmp_path / "many.gguf").folder
    assert folder is not None and len(list(folder.glob("model-*-of-*.safetensors"))) > 3
    assert all(bool((states[0][name] == states[1][name]).all()) for name in states[0])


def test_an_end_of_turn_ends_a_text_too(tmp_path: Path) -> None:
    fields = changed(tokenizer__ggml__eot_token_id=5, tokenizer__ggml__padding_token_id=0)
    (tmp_path / "m.gguf").write_bytes(file_of(fields, SHAPES))
    config = open_source(tmp_path / "m.gguf", weights=False).config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, [2, 5], 0)


def test_yarn_is_read(tmp_path: Path) -> None:
    scaling = {
        "type": "yarn",
        "factor": 4.0,
        "original_context_length": 16,
        "attn_factor": 2.0,
    }
    fields = changed(**{f"llama__rope__scaling__{key}": value for key, value in scaling.items()})
    (tmp_path / "m.gguf").write_bytes(file_of(fields, SHAPES))
    rope = open_source(tmp_path / "m.gguf", weights=False).config.rope_parameters
    assert rope["attention_factor"] == pytest.approx(2 * (0.1 * math.log(4) + 1))
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4.0, 16)


def test_any_damage_is_one_line(tmp_path: Path) -> None:
    """Bytes changed at random, most of them in the header."""
    whole, path = bytearray(file_of(FIELDS, SHAPES)), tmp_path / "m.gguf"
    dice = random.Random(0)
    refused = 0
    for _ in range(250):
        data = bytearray(whole)
        for _ in range(dice.randint(1, 4)):
            data[dice.randrange(1200)] = dice.choice((0, 1, 127, 128, 255, dice.randrange(256)))
        if dice.random() < 0.2:
            del data[dice.randrange(len(data)) :]
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        try:
            open_source(path, weights=False)
        except CompressoError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 100


def test_the_header_alone_costs_little(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(file_of(FIELDS, SHAPES))
    header = read_gguf_header(path)
    assert header.fields["llama.context_length"] == 64
    assert header.tensors["blk.0.ffn_up.weight"].shape == (4, 8)
