"""Writing a shrunk LLaMA, Mistral, Qwen2, Qwen3 or Gemma, or a mixture of experts (`formats/gguf_experts.py`), as one
GGUF file, the format of llama.cpp.

Equal widths in all layers are written as arch `llama`, others as `deci`, whose loader reads heads and FFN widths layer
by layer. What that engine does not compute is written as something equal that it does (each of these was run in
llama.cpp). Archs `qwen2`, `qwen3`, `gemma2` and `gemma3` hold one width for all layers; narrower ones are filled with
zeros to the widest, which computes the same and is no faster.

- attention without an FFN would lose the attention's output, so the FFN is written as one block of zeros;
- the first layer's heads size the cache, so a missing first attention is written as one head whose output is zero;
- a layer without attention and FFN is left out (not of a Gemma, whose layers llama.cpp tells apart by their number);
- under quantization FFN widths are filled with zero channels up to whole blocks.
"""

import importlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.arch.base import LayerShape
from compresso.checkpoint.atomic import new_file
from compresso.checkpoint.overwrite import GGUF_MARK
from compresso.checkpoint.storage import storage_errors
from compresso.errors import CheckpointError, ExportError
from compresso.formats.gguf_experts import MIXTURES, add_expert_fields, describe_mixture
from compresso.formats.gguf_gemma import ARCHS, add_gemma_fields, describe_gemma
from compresso.formats.gguf_tensors import BIASED, GEMMA, ONE_WIDTH, rope_of, tensors_of, write_tensors
from compresso.formats.gguf_tokenizer import add_tokenizer
from compresso.formats.layout import with_one_epsilon
from compresso.formats.shrunk import Shrunk, describe
from compresso.native import CLASSES, family_of

Dtype = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
TESTED = "0.19.0"
BLOCK = 32
"""Entries that share one scale in Q8_0 and Q4_0."""
_FILE_TYPES = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
    "q4_0": "MOSTLY_Q4_0",
}


def save_gguf(
    model: PreTrainedModel,
    shapes: Sequence[LayerShape],
    path: Path | str,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str = "f16",
    force: bool = False,
    check: Callable[[Path], None] | None = None,
) -> str:
    """Write a live shrunk model as the GGUF file `path`, whole or not at all; return its arch, such as "llama" or
    "deci".

    Args:
        shapes: widths of each layer; 0 for an absent sub-layer.
        dtype: f32, f16, bf16, q8_0 or q4_0, of all matrices; norms stay f32, and q4_0 keeps the head in q8_0, as
            llama.cpp does.
        force: replace a file that is there.
        check: called with the whole file before it takes its name; what it raises leaves `path` as it was.

    Raises ExportError if llama.cpp cannot hold the model or its tokenizer, NumericError if a tensor is not finite in
    `dtype`, CheckpointError if `path` may not be written, ResourceError if it does not fit.
    """
    if dtype not in get_args(Dtype):
        raise ExportError(f"unknown dtype '{dtype}' for gguf; known: {', '.join(get_args(Dtype))}.")
    gguf, path = library(), Path(path)
    if path.is_dir() or (path.exists() and not force):
        raise CheckpointError(f"{path} exists. Choose another output, or replace a GGUF file with --overwrite.")
    gemma = model.config.model_type in ARCHS
    if not gemma and model.config.model_type not in MIXTURES and family_of(model.config.model_type) is None:
        known = ", ".join((*CLASSES, *ARCHS, *MIXTURES))
        raise ExportError(
            f"cannot write model_type '{model.config.model_type}' as gguf; known: {known}. Give --format onnx"
        )
    describes = describe_mixture if model.config.model_type in MIXTURES else describe
    described = describe_gemma(model, shapes) if gemma else with_one_epsilon(describes(model, shapes))
    block = BLOCK if dtype.startswith("q") else 1
    kept = [index for index, shape in enumerate(described.shapes) if gemma or shape.query_heads or shape.channels]
    written = held_shapes([described.shapes[index] for index in kept], block)
    _check(described, written, kept, block)
    if described.family in ONE_WIDTH:
        arch, written = described.family, [_widest(written)] * len(written)
    else:
        arch = "llama" if len(set(written)) == 1 else "deci"
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, arch)
        try:
            writer.add_string(*GGUF_MARK)
            _add_fields(writer, gguf, described, written, dtype)
            add_tokenizer(writer, gguf, tokenizer, described.tensors["model.embed_tokens.weight"].shape[0])
            write_tensors(writer, gguf, list(tensors_of(described, written, kept)), dtype)
            writer.close()
        except BaseException:
            with suppress(OSError):  # what it still holds back does not fit either
                writer.close()
            raise
        if check is not None:
            check(temporary)
    return arch


def library() -> Any:
    """The gguf package. Raises ExportError if it is not installed."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ExportError(f"writing GGUF needs the gguf package; pip install gguf=={TESTED}") from error


def held_shapes(shapes: Sequence[LayerShape], block: int = 1) -> list[LayerShape]:
    """The widths that llama.cpp is told, for layers of which none is empty.

    >>> held = held_shapes([LayerShape(0, 0, 40), LayerShape(4, 2, 0), LayerShape(0, 0, 24)], block=32)
    >>> [(shape.query_heads, shape.kv_heads, shape.channels) for shape in held]
    [(1, 1, 64), (4, 2, 32), (0, 0, 32)]
    """
    held = [replace(shape, channels=-(-shape.channels // block) * block or BLOCK) for shape in shapes]
    if held and not held[0].query_heads:
        held[0] = replace(held[0], query_heads=1, kv_heads=1)
    return held


def _widest(shapes: Sequence[LayerShape]) -> LayerShape:
    """The widths that hold every layer.
    Raises ExportError if query heads share key/value heads in different numbers.
    """
    shared = sorted({shape.query_heads // shape.kv_heads for shape in shapes if shape.kv_heads})
    if len(shared) > 1:
        raise ExportError(
            f"layers have {' and '.join(map(str, shared))} query heads a key/value head, and one number is held. Write"
            " --format onnx."
        )
    kv_heads = max(shape.kv_heads for shape in shapes)
    channels, experts = (max(getattr(shape, field) for shape in shapes) for field in ("channels", "experts"))
    return LayerShape(kv_heads * shared[0] if shared else 0, kv_heads, channels, experts)


def _check(model: Shrunk, written: Sequence[LayerShape], kept: Sequence[int], block: int) -> None:
    """Raise ExportError naming what llama.cpp would not compute."""
    cure = "Keep the folder of safetensors, or write --format onnx."
    if not written:
        raise ExportError(f"every layer is empty, and gguf wants at least one. {cure}")
    config = model.config
    window = getattr(config, "sliding_window", None)
    if model.family == "mistral" and window is not None and window < config.max_position_embeddings:
        raise ExportError(
            f"config.sliding_window is {window}, and llama.cpp's llama attends to all. Set it to null, or write"
            " --format onnx."
        )
    if getattr(config, "hidden_act", "silu") != "silu":
        raise ExportError(f"config.hidden_act is '{config.hidden_act}', llama.cpp computes silu. {cure}")
    if model.family not in GEMMA and model.kinds is not None and "sliding_attention" in model.kinds:
        raise ExportError(f"layers attend to a sliding window, and llama.cpp's {model.family} attends to all. {cure}")
    held = tuple(f".{part}.bias" for part in BIASED) if model.family == "qwen2" else ()
    if biased := sorted(name for name in model.tensors if name.endswith(".bias") and not name.endswith(held)):
        raise ExportError(f"{biased[0]} is a bias, and none is written to gguf. {cure}")
    rope = rope_of(model)
    if rope["rope_type"] not in ("default", "linear", "llama3") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ExportError(
            f"rope_parameters {rope} are not written to gguf; default, linear and llama3 are, on whole heads. {cure}"
        )
    hidden = model.tensors["model.embed_tokens.weight"].shape[1]
    unquantized = "Write --dtype f16, or prune to multiples of that."
    if hidden % block:
        raise ExportError(
            f"hidden_size {hidden} is not a multiple of {block}, which a quantized row wants. {unquantized}"
        )
    for index, shape in zip(kept, written, strict=True):
        if (width := shape.query_heads * model.head_dim) % block:
            raise ExportError(
                f"layers.{index}: query heads x head_dim is {width}, a quantized row wants multiples of {block}."
                f" {unquantized}"
            )


def _add_fields(writer: Any, gguf: Any, model: Shrunk, written: Sequence[LayerShape], dtype: str) -> None:
    """What llama.cpp has to know beside the tensors."""
    rope, vocabulary = rope_of(model), model.tensors["model.embed_tokens.weight"]
    same = len(set(written)) == 1
    for add, values in (
        (writer.add_head_count, [shape.query_heads for shape in written]),
        (writer.add_head_count_kv, [shape.kv_heads for shape in written]),
        (writer.add_feed_forward_length, [shape.channels for shape in written]),
    ):
        add(values[0] if same else values)
    writer.add_block_count(len(written))
    writer.add_context_length(model.config.max_position_embeddings)
    writer.add_embedding_length(vocabulary.shape[1])
    writer.add_vocab_size(vocabulary.shape[0])
    writer.add_layer_norm_rms_eps(model.eps)
    writer.add_key_length(model.head_dim)  # the loader would take hidden_size / heads of layer 0
    writer.add_value_length(model.head_dim)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if model.family in GEMMA:
        add_gemma_fields(writer, model)
    if written[0].experts:
        add_expert_fields(writer, model, written[0])
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
