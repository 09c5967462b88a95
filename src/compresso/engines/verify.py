"""In which engines a checkpoint opens, and whether it computes there what it computes here.

The folder's own code runs only if it is, byte for byte, the file that compresso writes (`checkpoint/code.py`). What is
there but could not be asked is called "not checked", not "yes".
"""

import importlib.util
import math
import re
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.arch.base import arch_for
from compresso.checkpoint.code import NATIVE
from compresso.checkpoint.source import Source, has_tokenizer, is_causal, load_model, load_tokenizer, open_source
from compresso.engines import llama_cpp
from compresso.engines import transformers_process as opened
from compresso.engines import vllm as vllm_engine
from compresso.engines.parity import (
    DECI,
    ONNX,
    ONNX_WITHIN,
    OPENVINO,
    PACKED,
    PROBABILITIES_WITHIN,
    VLLM,
    WORDS,
    Parity,
    check_llama_cpp,
    check_onnx_runtime,
    check_packed,
    check_transformers,
    check_vllm,
    check_vllm_packed,
    ids_of,
)
from compresso.errors import CheckpointError, CompressoError
from compresso.formats.gguf import save_gguf
from compresso.formats.onnx import save_onnx
from compresso.formats.packed import TESTED, packing_of, save_packed
from compresso.formats.vllm_deci import DECI_CLASS, save_vllm_deci
from compresso.native.stock import as_stock
from compresso.sweep.memory import available


def verify(model: str | Path) -> list[Parity]:
    """Ask every engine about a hub id or a folder of safetensors.

    Raises CheckpointError if it is no causal language model or cannot be read, ResourceError if memory is short.
    """
    source = open_source(model)
    if source.folder is None or not is_causal(source.config):
        raise CheckpointError(
            f"model {source.name} is not a causal language model with weights, and verify compares their logits."
        )
    live = load_model(source, dtype=torch.float32)
    tokenizer = load_tokenizer(source) if has_tokenizer(source) else None
    ids = ids_of(tokenizer, source.config.vocab_size)
    logits, greedy = opened.continued(live, ids)
    with tempfile.TemporaryDirectory() as scratch:
        written = [_llama_cpp(live, tokenizer, Path(scratch)), *_onnx(live, tokenizer, Path(scratch))]
        in_vllm = _vllm(source.folder, live, ids, logits, greedy, Path(scratch))
        del live
        answers = [_transformers(engine, source, ids, logits, greedy, Path(scratch)) for engine in WORDS]
        packed = _compressed(source, tokenizer, Path(scratch))
    return [*answers, *written, *packed, *in_vllm]


def engines(folder: Path) -> list[dict[str, Any]]:
    """What `verify` says of a written folder, for its records; where memory does not suffice, that."""
    size = 4 * sum(math.prod(tensor.shape) for tensor in open_source(folder).tensors.values())
    if 2.2 * size > (there := available(torch.device("cpu"))):
        reason = (
            f"two copies in float32 need {2 * size / 1e9:.1f} GB, and {there / 1e9:.1f} GB are there; compresso verify"
            " asks elsewhere"
        )
        return [asdict(Parity(engine, "not checked", reason)) for engine in WORDS]
    temporary = re.compile(re.escape(tempfile.gettempdir()) + r"[^\s:]*")  # records name no folder of this machine
    return [asdict(answer) | {"reason": temporary.sub("a temporary file", answer.reason)} for answer in verify(folder)]


def _transformers(engine: str, source: Source, ids: Tensor, logits: Tensor, greedy: Tensor, scratch: Path) -> Parity:
    """Open the folder in a fresh process, with compresso, with the folder's code, or with neither."""
    assert source.folder is not None
    return check_transformers(engine, source.folder, ids, logits, greedy, scratch)


def _llama_cpp(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, scratch: Path) -> Parity:
    """Write the model as GGUF in f32, and open that."""
    engine = "llama.cpp, as GGUF"
    missing = (
        "gguf is not installed; pip install gguf" if importlib.util.find_spec("gguf") is None else llama_cpp.missing()
    )
    if missing is not None:
        return Parity(engine, "not installed", missing)
    if tokenizer is None:
        return Parity(engine, "no", "it has no tokenizer, which a GGUF file wants")
    path = scratch / "model.gguf"
    try:
        stock = as_stock(model)
        save_gguf(stock, arch_for(stock.config).shapes(stock), path, tokenizer, "f32")
        return check_llama_cpp(path, stock, tokenizer, engine, PROBABILITIES_WITHIN)
    except CompressoError as error:
        return Parity(engine, "no", str(error))
    finally:
        path.unlink(missing_ok=True)


def _onnx(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, scratch: Path) -> list[Parity]:
    """Write the model as ONNX in f32, and run that in ONNX Runtime and OpenVINO."""
    runtimes: dict[Any, str] = {ONNX: "onnxruntime", OPENVINO: "openvino"}
    missing = {
        engine: next((name for name in ("onnxscript", runtime) if importlib.util.find_spec(name) is None), None)
        for engine, runtime in runtimes.items()
    }
    answers = {
        engine: Parity(
            engine, "not installed", f"{name} is not installed; pip install onnx onnxscript {runtimes[engine]}"
        )
        for engine, name in missing.items()
    }
    asked = [engine for engine, name in missing.items() if name is None]
    folder = scratch / "onnx"
    try:
        stock = as_stock(model)
        if asked:
            save_onnx(stock, arch_for(stock.config).shapes(stock), folder)
        answers |= {engine: check_onnx_runtime(folder, stock, tokenizer, ONNX_WITHIN, engine) for engine in asked}
    except CompressoError as error:
        answers |= {engine: Parity(engine, "no", str(error)) for engine in asked}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return list(answers.values())


def _vllm(
    folder: Path, model: PreTrainedModel, ids: Tensor, logits: Tensor, greedy: Tensor, scratch: Path
) -> list[Parity]:
    """Open the folder in vLLM; where it does not compute the same there, write it for vLLM's DeciLM class, and open
    that, too.
    """
    if (missing := vllm_engine.missing()) is not None:
        return [Parity(VLLM, "not installed", missing)]
    answer = check_vllm(VLLM, folder, ids, logits, greedy, shipped=NATIVE)
    if answer.opens in ("yes", "not checked"):
        return [answer]
    twin = scratch / "deci"
    try:
        stock = as_stock(model)
        save_vllm_deci(stock, arch_for(stock.config).shapes(stock), twin)
        return [answer, check_vllm(DECI, twin, ids, logits, greedy, shipped=DECI_CLASS)]
    except CompressoError as error:
        return [answer, Parity(DECI, "no", str(error))]
    finally:
        shutil.rmtree(twin, ignore_errors=True)


def _compressed(source: Source, tokenizer: PreTrainedTokenizerBase | None, scratch: Path) -> list[Parity]:
    """Pack what the run rounded, and open that in plain transformers and, if it is there, in vLLM."""
    if importlib.util.find_spec("compressed_tensors") is None:
        return [
            Parity(
                PACKED,
                "not installed",
                f"compressed-tensors is not installed; pip install compressed-tensors=={TESTED}",
            )
        ]
    try:
        packing = packing_of(source.folder)
    except CompressoError as error:
        return [Parity(PACKED, "not checked", str(error))]
    folder = scratch / "packed"
    try:
        model = load_model(source)
        save_packed(model, packing, folder, tokenizer=tokenizer)
    except CompressoError as error:
        return [Parity(PACKED, "no", str(error))]
    answer = check_packed(folder, model, packing, tokenizer)
    return [answer] if vllm_engine.missing() else [answer, check_vllm_packed(folder, model, packing, tokenizer)]
