"""A checkpoint written in another format, and reopened."""

import importlib.util
import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from compresso.arch.base import arch_for
from compresso.checkpoint.overwrite import EXPORTS, refuse_foreign
from compresso.checkpoint.source import Source, has_tokenizer, load_model, load_tokenizer, open_source
from compresso.engines import llama_cpp
from compresso.engines import vllm as vllm_engine
from compresso.engines.llama_quantize import KINDS, fallbacks, quantize, tool
from compresso.engines.parity import (
    DECI,
    ONNX_WITHIN,
    check_llama_cpp,
    check_onnx_runtime,
    check_packed,
    check_vllm,
    ids_of,
)
from compresso.engines.transformers_process import continued
from compresso.errors import CheckpointError, ExportError, deprecated, nearest
from compresso.formats.gguf import library, save_gguf
from compresso.formats.onnx import head_dim, save_onnx
from compresso.formats.packed import packing_of, save_packed
from compresso.formats.vllm_deci import DECI_CLASS, save_vllm_deci
from compresso.metrics.size import weight_bytes
from compresso.native.stock import as_stock

log = logging.getLogger(__name__)
FORMATS = ("gguf", "onnx", "compressed-tensors", "vllm-deci")
_WITHIN = {"f32": 1e-2, "f16": 0.1, "bf16": 0.1}
"""Probabilities of these files may differ by so much; how far a quantized model goes from its source is its user's to
judge.
"""


def export(
    model: str | Path,
    output: str | Path,
    *,
    format: str,
    dtype: str | None = None,
    overwrite: bool = False,
    force: bool | None = None,
) -> dict[str, Any]:
    """Write a folder of safetensors or a hub id in another format, and open it in the engine where that is installed.

    Args:
        model: folder of safetensors or hub id.
        output: the file or folder to write.
        format: gguf (a file), or a folder of onnx, compressed-tensors (of what a stage rounded) or vllm-deci.
        dtype: of gguf: f32, f16 (if None), bf16, q8_0, q4_0, or a K-quant such as q4_k_m, made by llama.cpp; of
            onnx: f32 (if None) or int8.
        overwrite: replace an earlier export of the same format; a folder with anything else in it is refused.
        force: deprecated: `overwrite`.

    Returns:
        `{"output", "format", "arch", "dtype", "bytes", "checked", "difference", "same_tokens"}`; `checked` says by what
        it was opened, or why it was not; `difference` is the largest of the probabilities after a text, None if
        unchecked.

    Raises:
        CheckpointError: if the model cannot be read or the output may not be written.
        ExportError: if the format cannot hold the model, or the engine reads something else than was written; then no
            file is left.
    """
    if format not in FORMATS:
        raise ExportError(f"unknown format '{format}'; {nearest(format, FORMATS)}")
    if force is not None:
        deprecated("force=", "overwrite=")
        overwrite = overwrite or force
    output = Path(output)
    if overwrite:
        _refuse_foreign(output, format)
    source = open_source(model)
    if format == "compressed-tensors":
        if dtype is not None:
            raise ExportError(
                f"dtype={dtype}: compressed-tensors files have the bits that the run rounded to; leave --dtype out"
            )
        return _packed(source, output, overwrite)
    if format == "vllm-deci":
        if dtype is not None:
            raise ExportError(f"dtype={dtype}: vllm-deci keeps the stored one; leave --dtype out")
        return _deci(source, output, overwrite)
    if format == "onnx":
        return _onnx(source, output, dtype or "f32", overwrite)
    return _gguf(source, output, dtype or "f16", overwrite)


def show(facts: Mapping[str, Any], as_json: bool) -> None:
    """Print what `export` returned, as JSON or in a line."""
    if as_json:
        print(json.dumps(facts, indent=2, allow_nan=False))
        return
    print(f"{facts['output']}: {facts['bytes']:,} bytes, arch {facts['arch']}, {facts['dtype']}; {facts['checked']}")


def _refuse_foreign(output: Path, format: str) -> None:
    """Raise CheckpointError if what lies at `output` is no export of this format alone."""
    if format != "gguf":
        refuse_foreign(output, EXPORTS[format])
    elif output.is_file() and _begins(output) != b"GGUF":
        raise CheckpointError(
            f"{output} is no GGUF file and will not be replaced even with --overwrite. Choose another output."
        )


def _begins(path: Path) -> bytes:
    """The four bytes that say what a file is."""
    with path.open("rb") as file:
        return file.read(4)


def _gguf(source: Source, output: Path, dtype: str, force: bool) -> dict[str, Any]:
    """A GGUF file, opened in llama.cpp."""
    library()
    by_tool = dtype in KINDS
    if by_tool:
        tool(dtype)
        if output.is_dir() or (output.exists() and not force):
            raise CheckpointError(f"{output} exists. Choose another output, or replace a GGUF file with --overwrite.")
    tokenizer = load_tokenizer(source)
    live = as_stock(load_model(source, dtype=torch.float32))
    told: dict[str, Any] = {
        "output": str(output),
        "format": "gguf",
        "dtype": dtype,
        "difference": None,
        "same_tokens": None,
    }

    def check(written: Path) -> None:
        if (missing := llama_cpp.missing()) is not None:
            told["checked"] = f"not opened: {missing}"
            return
        answer = check_llama_cpp(written, live, tokenizer, "llama.cpp", _WITHIN.get(dtype, 1.0))
        if answer.opens != "yes":
            raise ExportError(
                f"{output} would read back differently in llama.cpp: {answer.reason}. It was not written."
            )
        told.update(checked="opened in llama.cpp", difference=answer.difference, same_tokens=answer.same_tokens)

    shapes = arch_for(live.config).shapes(live)
    if not by_tool:
        told["arch"] = save_gguf(live, shapes, output, tokenizer, dtype, force, check)
        return told | {"bytes": output.stat().st_size}
    for remark in fallbacks(shapes, int(live.config.hidden_size), head_dim(live)):
        log.warning(remark)
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        whole, made = Path(scratch, "f16.gguf"), Path(scratch, "quantized.gguf")
        told["arch"] = save_gguf(live, shapes, whole, tokenizer, "f16")
        quantize(whole, made, dtype)
        check(made)
        made.replace(output)
    return told | {"bytes": output.stat().st_size}


def _onnx(source: Source, output: Path, dtype: str, force: bool) -> dict[str, Any]:
    """A folder with an ONNX graph, opened in ONNX Runtime."""
    tokenizer = load_tokenizer(source) if has_tokenizer(source) else None
    live = as_stock(load_model(source, dtype=torch.float32))
    told: dict[str, Any] = {"output": str(output), "format": "onnx", "arch": source.config.model_type, "dtype": dtype}
    told |= {"difference": None, "same_tokens": None}

    def check(written: Path) -> None:
        if importlib.util.find_spec("onnxruntime") is None:
            told["checked"] = "not opened: onnxruntime is not installed"
            return
        answer = check_onnx_runtime(written, live, tokenizer, ONNX_WITHIN if dtype == "f32" else None)
        if answer.opens != "yes":
            raise ExportError(
                f"{output} would read back differently in ONNX Runtime: {answer.reason}. It was not written."
            )
        told.update(checked="opened in ONNX Runtime", difference=answer.difference, same_tokens=answer.same_tokens)

    save_onnx(live, arch_for(live.config).shapes(live), output, tokenizer, dtype=dtype, force=force, check=check)
    return told | {"bytes": sum(path.stat().st_size for path in output.glob("model.onnx*"))}


def _deci(source: Source, output: Path, force: bool) -> dict[str, Any]:
    """A folder for vLLM's DeciLM class, opened in vLLM."""
    tokenizer = load_tokenizer(source) if has_tokenizer(source) else None
    live = as_stock(load_model(source))
    told: dict[str, Any] = {
        "output": str(output),
        "format": "vllm-deci",
        "arch": "DeciLM",
        "dtype": str(live.dtype).removeprefix("torch."),
    }
    told |= {"difference": None, "same_tokens": None}

    def check(written: Path) -> None:
        if (missing := vllm_engine.missing()) is not None:
            told["checked"] = f"not opened: {missing}"
            return
        ids = ids_of(tokenizer, live.config.vocab_size)
        answer = check_vllm(DECI, written, ids, *continued(live.float(), ids), shipped=DECI_CLASS)
        if answer.opens != "yes":
            raise ExportError(f"{output} would read back differently in vLLM: {answer.reason}. It was not written.")
        told.update(checked="opened in vLLM", difference=answer.difference, same_tokens=answer.same_tokens)

    save_vllm_deci(live, arch_for(live.config).shapes(live), output, tokenizer, force=force, check=check)
    return told | {"bytes": weight_bytes(output)}


def _packed(source: Source, output: Path, force: bool) -> dict[str, Any]:
    """A folder whose rounded linears are packed, opened by plain transformers in a fresh process."""
    packing = packing_of(source.folder)
    tokenizer = load_tokenizer(source) if has_tokenizer(source) else None
    stored = load_model(source)
    told: dict[str, Any] = {"output": str(output), "format": "compressed-tensors", "arch": source.config.model_type}

    def check(written: Path) -> None:
        answer = check_packed(written, stored, packing, tokenizer)
        if answer.opens != "yes":
            raise ExportError(
                f"{output} would read back differently in transformers: {answer.reason}. It was not written."
            )
        told.update(checked="opened in transformers", difference=answer.difference, same_tokens=answer.same_tokens)

    save_packed(stored, packing, output, tokenizer=tokenizer, force=force, check=check)
    return told | {"dtype": packing.kind, "bytes": weight_bytes(output)}
