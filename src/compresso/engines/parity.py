"""What one engine makes of a folder or file that was written, compared with the live model it was written from.

Each engine opens it in a process of its own, but for ONNX Runtime and OpenVINO. An answer is "yes" only if it opens and
computes the same.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.checkpoint.code import NATIVE, Shipped, refuse_code, trusted
from compresso.edit.round_inputs import keep_inputs_, round_inputs_
from compresso.engines import llama_cpp
from compresso.engines import transformers_process as opened
from compresso.engines import vllm as vllm_engine
from compresso.engines.onnx_runtime import OnnxModel
from compresso.engines.openvino import OpenVinoModel
from compresso.errors import CheckpointError, ExportError
from compresso.formats.packed import Packing

TEXT = "The house by the river is 42 years old, and the"
LOGITS_WITHIN = 1e-3
"""Of the largest logit, or of 1 if that is more: differences that rounding in float32 explains."""
PROBABILITIES_WITHIN = 1e-2
ONNX_WITHIN = 1e-4
"""Of logits in ONNX Runtime and OpenVINO, as `LOGITS_WITHIN`."""
HALF_PROBABILITIES_WITHIN = 0.1
"""As `PROBABILITIES_WITHIN`, of what is stored or computed with half the precision."""
HALF_WITHIN = 2e-2
"""As `LOGITS_WITHIN`, where scales of few bits are stored with half the precision."""
VLLM = "vLLM"
DECI = "vLLM, as vllm-deci"
VLLM_PACKED = "vLLM, packed"
OWN = "transformers, compresso imported"
ONNX: Literal["ONNX Runtime, as ONNX"] = "ONNX Runtime, as ONNX"
OPENVINO: Literal["OpenVINO, as ONNX"] = "OpenVINO, as ONNX"
PACKED = "compressed-tensors, packed"
WORDS = {"transformers": (), OWN: ("compresso",), "transformers, trust_remote_code": ("remote",)}


@dataclass(frozen=True)
class Parity:
    """What one engine makes of a checkpoint.

    Args:
        opens: "yes" only if it opens and computes the same.
        reason: one line; empty for a plain yes.
        difference: largest, of probabilities (llama.cpp, vLLM) or of logits (others); None if nothing was computed.
        same_tokens: of `opened.NEW_TOKENS` greedy tokens, how many come before the first that differs.
    """

    engine: str
    opens: Literal["yes", "no", "not installed", "not checked"]
    reason: str = ""
    difference: float | None = None
    same_tokens: int | None = None


def ids_of(tokenizer: PreTrainedTokenizerBase | None, size: int) -> Tensor:
    """Ids [seq] of a text; without a tokenizer, a few that the model has."""
    if tokenizer is None:
        return torch.arange(1, 13) * 7919 % size
    return torch.tensor(tokenizer(TEXT)["input_ids"], dtype=torch.long)


def check_packed(
    folder: Path, model: PreTrainedModel, packing: Packing, tokenizer: PreTrainedTokenizerBase | None
) -> Parity:
    """Compare a packed folder, opened by plain transformers in a fresh process, with the live model it was written
    from.

    The model becomes float32. Where activations are rounded, here and there by steps of slightly different size, a
    difference of twice what rounding them makes is allowed.
    """
    within = LOGITS_WITHIN if model.dtype == torch.float32 else HALF_WITHIN
    ids = ids_of(tokenizer, model.config.vocab_size)
    logits, greedy, made = _rounded(model, packing, ids)
    within += 2 * made / max(1.0, float(logits.abs().max()))
    with tempfile.TemporaryDirectory() as scratch:
        return replace(
            check_transformers(next(iter(WORDS)), folder, ids, logits, greedy, Path(scratch), within), engine=PACKED
        )


def check_vllm_packed(
    folder: Path, model: PreTrainedModel, packing: Packing, tokenizer: PreTrainedTokenizerBase | None
) -> Parity:
    """As `check_packed` in vLLM, which computes weights of few bits with half the precision.
    The model becomes float32.
    """
    ids = ids_of(tokenizer, model.config.vocab_size)
    logits, greedy, _ = _rounded(model, packing, ids)
    return check_vllm(VLLM_PACKED, folder, ids, logits, greedy, dtype="bfloat16")


def _rounded(model: PreTrainedModel, packing: Packing, ids: Tensor) -> tuple[Tensor, Tensor, float]:
    """Logits and greedy ids with activations rounded as they were packed, in float32, and the largest difference that
    makes to a logit.
    """
    logits, greedy = opened.continued(model.float(), ids)
    if not packing.inputs:
        return logits, greedy, 0.0
    exact = logits
    round_inputs_(model, packing.inputs, packing.linears)
    logits, greedy = opened.continued(model, ids)
    keep_inputs_(model)
    return logits, greedy, float((logits - exact).abs().max())


def check_transformers(
    engine: str, folder: Path, ids: Tensor, logits: Tensor, greedy: Tensor, scratch: Path, within: float = LOGITS_WITHIN
) -> Parity:
    """What a fresh process makes of a folder. Raises CheckpointError if it names code that is not of compresso."""
    words = WORDS[engine]
    refuse_code(folder)
    if "remote" in words and (strange := _strange(folder, NATIVE)):
        return Parity(engine, "not checked", strange)
    given, result = scratch / "ids.safetensors", scratch / "logits.safetensors"
    result.unlink(missing_ok=True)
    save_file({"ids": ids.contiguous()}, given)
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
    home = {"HF_MODULES_CACHE": str(scratch / "modules")} if "remote" in words else {}
    done = subprocess.run(
        [sys.executable, "-P", opened.__file__, str(folder.resolve()), str(given), str(result), *words],
        env=os.environ | home | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return Parity(engine, "no", _why(done.stderr, done.returncode).replace(str(folder.resolve()), "this folder"))
    found = load_file(result)
    if found["logits"].shape != logits.shape:
        return Parity(engine, "no", f"logits are {list(found['logits'].shape)} instead of {list(logits.shape)}")
    difference = float((found["logits"] - logits).abs().max())
    return judged(
        engine,
        difference,
        within_rounding(found["logits"], logits, within),
        found["greedy"].tolist(),
        greedy.tolist(),
        "logits",
    )


def _strange(folder: Path, shipped: Shipped) -> str:
    """Why the code beside the weights of a folder is not run; empty if it may, or if there is none."""
    try:
        trusted(folder, shipped)
    except CheckpointError as error:
        return str(error).replace(str(folder), "this folder")
    return ""


def within_rounding(found: Tensor, wanted: Tensor, within: float = LOGITS_WITHIN) -> bool:
    """Whether rounding explains the difference of two logits [seq, vocabulary]; NaN does not."""
    return float((found - wanted).abs().max()) <= within * max(1.0, float(wanted.abs().max()))


def check_onnx_runtime(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    within: float | None,
    engine: Literal["ONNX Runtime, as ONNX", "OpenVINO, as ONNX"] = ONNX,
) -> Parity:
    """Compare an ONNX folder in an engine, prompt and cached steps, with the live model it was written from; within
    None allows all.
    """
    ids = ids_of(tokenizer, model.config.vocab_size)
    logits, greedy = opened.continued(model, ids)
    try:
        written = (OnnxModel if engine == ONNX else OpenVinoModel)(folder)
        found, cache = written(ids[:-1].unsqueeze(0), written.empty())
        last, _ = written(ids[-1:].unsqueeze(0), cache)
        tokens = written.greedy(ids, len(greedy)).tolist()
    except RuntimeError as error:  # of the engine
        return Parity(engine, "no", " ".join(str(error).split())[:300])
    found = torch.cat([found, last], dim=1)[0]
    difference = float((found - logits).abs().max())
    fits = bool(found.isfinite().all()) if within is None else within_rounding(found, logits, within)
    return judged(engine, difference, fits, tokens, greedy.tolist(), "logits")


def check_llama_cpp(
    path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, engine: str, within: float
) -> Parity:
    """Compare a GGUF file in llama.cpp with the live model it was written from.
    Raises ExportError if it does not open.
    """
    found = llama_cpp.continue_texts(path, [TEXT], opened.NEW_TOKENS)[0]
    ids = ids_of(tokenizer, model.config.vocab_size)
    if found.tokens != ids.tolist():
        return Parity(engine, "no", f"it reads the text as tokens {found.tokens}, transformers as {ids.tolist()}")
    logits, greedy = opened.continued(model, ids)
    difference = float((torch.tensor(found.probabilities[0]) - logits[-1].softmax(-1)).abs().max())
    return judged(engine, difference, difference <= within, found.greedy, greedy.tolist(), "probabilities")


def check_vllm(
    engine: str,
    folder: Path,
    ids: Tensor,
    logits: Tensor,
    greedy: Tensor,
    *,
    dtype: str = "float32",
    shipped: Shipped | None = None,
) -> Parity:
    """Compare a folder in vLLM with logits [seq, vocabulary] and greedy ids of the model it was written from.

    Args:
        dtype: to compute in.
        shipped: code of ours that may run if the folder names it; None for none.
    """
    if shipped is not None and (strange := _strange(folder, shipped)):
        return Parity(engine, "not checked", strange)
    try:
        found = vllm_engine.continue_ids(folder, ids, len(greedy), dtype=dtype, shipped=shipped)
    except ExportError as error:
        return Parity(engine, "no", str(error))
    wanted = logits[-1].softmax(-1)
    if found.logprobs.shape != wanted.shape:
        return Parity(engine, "no", f"probabilities are of {len(found.logprobs)} tokens instead of {len(wanted)}")
    difference = float((found.logprobs.exp() - wanted).abs().max())
    within = PROBABILITIES_WITHIN if dtype == "float32" else HALF_PROBABILITIES_WITHIN
    return judged(engine, difference, difference <= within, found.greedy.tolist(), greedy.tolist(), "probabilities")


def judged(
    engine: str, difference: float, within: bool, found: Sequence[int], wanted: Sequence[int], what: str
) -> Parity:
    """Yes if the difference is allowed;
    tokens may part where two are equally likely, so they are told and not judged.
    """
    same = next(
        (step for step, (one, other) in enumerate(zip(found, wanted, strict=True)) if one != other), len(wanted)
    )
    reason = "" if within else f"{what} differ by up to {difference:.2g}"
    return Parity(engine, "yes" if within else "no", reason, difference, same)


def _why(stderr: str, code: int) -> str:
    """The last line of a traceback that names an exception."""
    lines = [line for line in stderr.strip().splitlines() if line and not line[0].isspace()]
    named = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception"))]
    return " ".join((named or lines or [f"ended with {code}"])[-1].split())[:300]
