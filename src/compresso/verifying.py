"""In which engines a checkpoint opens, and whether it computes there what it computes here.

Each engine opens it in a process of its own. The folder's own code runs only if it is, byte for byte, the file that compresso writes. An
engine that is there but that nothing here can ask is called "not checked", not "yes".
"""

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.arch.base import arch_for
from compresso.checkpoint.folder import read_json
from compresso.checkpoint.source import Source, has_tokenizer, is_causal, load_model, load_tokenizer, open_source
from compresso.drive.memory import available
from compresso.edit.round_inputs import keep_inputs_, round_inputs_
from compresso.errors import CheckpointError, CompressoError
from compresso.export import llama_cpp, opened
from compresso.export.gguf import save_gguf
from compresso.export.onnx import save_onnx
from compresso.export.onnx_runtime import OnnxModel
from compresso.export.packed import TESTED, Packing, packing_of, save_packed
from compresso.native import MODELING_FILE
from compresso.native.stock import as_stock

TEXT = "The house by the river is 42 years old, and the"
LOGITS_WITHIN = 1e-3
"""Of the largest logit, or of 1 if that is more: differences that rounding in float32 explains."""
PROBABILITIES_WITHIN = 1e-2
ONNX_WITHIN = 1e-4
"""Of logits in ONNX Runtime, as `LOGITS_WITHIN`."""
HALF_WITHIN = 2e-2
"""As `LOGITS_WITHIN`, where scales of few bits are stored with half the precision."""
OWN = "transformers, compresso imported"
ONNX = "ONNX Runtime, as ONNX"
PACKED = "compressed-tensors, packed"
_WORDS = {"transformers": (), OWN: ("compresso",), "transformers, trust_remote_code": ("remote",)}
_UNASKED = {"vLLM": "vllm"}


@dataclass(frozen=True)
class Answer:
    """What one engine makes of a checkpoint.

    Args:
        opens: "yes" only if it opens and computes the same.
        reason: one line; empty for a plain yes.
        difference: largest, of logits (transformers) or of probabilities (llama.cpp); None if nothing was computed.
        same_tokens: of `opened.NEW_TOKENS` greedy tokens, how many come before the first that differs.
    """

    engine: str
    opens: Literal["yes", "no", "not installed", "not checked"]
    reason: str = ""
    difference: float | None = None
    same_tokens: int | None = None


def verify(model: str | Path) -> list[Answer]:
    """Ask every engine about a hub id or a folder of safetensors.

    Raises CheckpointError if it is no causal language model or cannot be read, ResourceError if memory is short.
    """
    source = open_source(model)
    if source.folder is None or not is_causal(source.config):
        raise CheckpointError(f"model {source.name} is not a causal language model with weights, and verify compares their logits.")
    live = load_model(source, dtype=torch.float32)
    tokenizer = load_tokenizer(source) if has_tokenizer(source) else None
    ids = _ids(tokenizer, source.config.vocab_size)
    logits, greedy = opened.continued(live, ids)
    with tempfile.TemporaryDirectory() as scratch:
        in_llama_cpp = _llama_cpp(live, tokenizer, Path(scratch))
        in_onnx_runtime = _onnx_runtime(live, tokenizer, Path(scratch))
        del live
        answers = [_transformers(engine, source, ids, logits, greedy, Path(scratch)) for engine in _WORDS]
        packed = _compressed(source, tokenizer, Path(scratch))
    return [*answers, in_llama_cpp, in_onnx_runtime, packed, *(_unasked(engine, package) for engine, package in _UNASKED.items())]


def engines(folder: Path) -> list[dict[str, Any]]:
    """What `verify` says of a written folder, for its records; where memory does not suffice, that."""
    size = 4 * sum(math.prod(tensor.shape) for tensor in open_source(folder).tensors.values())
    if 2.2 * size > (there := available(torch.device("cpu"))):
        reason = f"two copies in float32 need {2 * size / 1e9:.1f} GB, and {there / 1e9:.1f} GB are there; compresso verify asks elsewhere"
        return [asdict(Answer(engine, "not checked", reason)) for engine in _WORDS]
    temporary = re.compile(re.escape(tempfile.gettempdir()) + r"[^\s:]*")  # records name no folder of this machine
    return [asdict(answer) | {"reason": temporary.sub("a temporary file", answer.reason)} for answer in verify(folder)]


def _ids(tokenizer: PreTrainedTokenizerBase | None, size: int) -> Tensor:
    """Ids [seq] of a text; without a tokenizer, a few that the model has."""
    if tokenizer is None:
        return torch.arange(1, 13) * 7919 % size
    return torch.tensor(tokenizer(TEXT)["input_ids"], dtype=torch.long)


def _transformers(engine: str, source: Source, ids: Tensor, logits: Tensor, greedy: Tensor, scratch: Path) -> Answer:
    """Open the folder in a fresh process, with compresso, with the folder's code, or with neither."""
    assert source.folder is not None
    if "remote" in _WORDS[engine] and (strange := _strange_code(source.folder)) is not None:
        return Answer(engine, "not checked", strange)
    return _opened(engine, source.folder, ids, logits, greedy, scratch)


def ask_packed(folder: Path, model: PreTrainedModel, packing: Packing, tokenizer: PreTrainedTokenizerBase | None) -> Answer:
    """Compare a packed folder, opened by plain transformers in a fresh process, with the live model it was written from.

    The model becomes float32. Where activations are rounded, here and there by steps of slightly different size, a difference of twice what
    rounding them makes is allowed.
    """
    within = LOGITS_WITHIN if model.dtype == torch.float32 else HALF_WITHIN
    ids = _ids(tokenizer, model.config.vocab_size)
    logits, greedy = opened.continued(model.float(), ids)
    if packing.inputs:
        exact = logits
        round_inputs_(model, packing.inputs, packing.linears)
        logits, greedy = opened.continued(model, ids)
        keep_inputs_(model)
        within += 2 * float((logits - exact).abs().max()) / max(1.0, float(logits.abs().max()))
    with tempfile.TemporaryDirectory() as scratch:
        return replace(_opened(next(iter(_WORDS)), folder, ids, logits, greedy, Path(scratch), within), engine=PACKED)


def _opened(engine: str, folder: Path, ids: Tensor, logits: Tensor, greedy: Tensor, scratch: Path, within: float = LOGITS_WITHIN) -> Answer:
    """What a fresh process makes of a folder."""
    words = _WORDS[engine]
    given, result = scratch / "ids.safetensors", scratch / "logits.safetensors"
    result.unlink(missing_ok=True)
    save_file({"ids": ids.contiguous()}, given)
    root = str(Path(__file__).resolve().parents[1])
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
        return Answer(engine, "no", _why(done.stderr, done.returncode).replace(str(folder.resolve()), "this folder"))
    found = load_file(result)
    if found["logits"].shape != logits.shape:
        return Answer(engine, "no", f"logits are {list(found['logits'].shape)} instead of {list(logits.shape)}")
    difference = float((found["logits"] - logits).abs().max())
    return _judged(engine, difference, _within(found["logits"], logits, within), found["greedy"].tolist(), greedy.tolist(), "logits")


def _within(found: Tensor, wanted: Tensor, within: float = LOGITS_WITHIN) -> bool:
    """Whether rounding explains the difference of two logits [seq, vocabulary]; NaN does not."""
    return float((found - wanted).abs().max()) <= within * max(1.0, float(wanted.abs().max()))


def _strange_code(folder: Path) -> str | None:
    """Why the code a folder brings along must not run; None if it brings none or ours."""
    mapped = read_json(folder / "config.json").get("auto_map")
    if not mapped:
        return None
    ours = isinstance(mapped, dict) and all(str(name).split(".")[0] == MODELING_FILE.stem for name in mapped.values())
    files = list(folder.rglob("*.py"))
    if ours and [path.name for path in files] == [MODELING_FILE.name] and files[0].read_bytes() == MODELING_FILE.read_bytes():
        return None
    return f"its code is not this version's {MODELING_FILE.name}, and is not run"


def _llama_cpp(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, scratch: Path) -> Answer:
    """Write the model as GGUF in f32, and open that."""
    engine = "llama.cpp, as GGUF"
    missing = "gguf is not installed; pip install gguf" if importlib.util.find_spec("gguf") is None else llama_cpp.missing()
    if missing is not None:
        return Answer(engine, "not installed", missing)
    if tokenizer is None:
        return Answer(engine, "no", "it has no tokenizer, which a GGUF file wants")
    path = scratch / "model.gguf"
    try:
        stock = as_stock(model)
        save_gguf(stock, arch_for(stock.config).shapes(stock), path, tokenizer, "f32")
        return ask_llama_cpp(path, stock, tokenizer, engine, PROBABILITIES_WITHIN)
    except CompressoError as error:
        return Answer(engine, "no", str(error))
    finally:
        path.unlink(missing_ok=True)


def _onnx_runtime(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, scratch: Path) -> Answer:
    """Write the model as ONNX in f32, and run that."""
    missing = [name for name in ("onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        return Answer(ONNX, "not installed", f"{missing[0]} is not installed; pip install onnx onnxscript onnxruntime")
    folder = scratch / "onnx"
    try:
        stock = as_stock(model)
        save_onnx(stock, arch_for(stock.config).shapes(stock), folder)
        return ask_onnx_runtime(folder, stock, tokenizer, ONNX_WITHIN)
    except CompressoError as error:
        return Answer(ONNX, "no", str(error))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def ask_onnx_runtime(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, within: float | None) -> Answer:
    """Compare an ONNX folder in ONNX Runtime, prompt and cached steps, with the live model it was written from; within None allows all."""
    ids = _ids(tokenizer, model.config.vocab_size)
    logits, greedy = opened.continued(model, ids)
    try:
        written = OnnxModel(folder)
        found, cache = written(ids[:-1].unsqueeze(0), written.empty())
        last, _ = written(ids[-1:].unsqueeze(0), cache)
        tokens = written.greedy(ids, len(greedy)).tolist()
    except RuntimeError as error:  # of the engine
        return Answer(ONNX, "no", " ".join(str(error).split())[:300])
    found = torch.cat([found, last], dim=1)[0]
    difference = float((found - logits).abs().max())
    fits = bool(found.isfinite().all()) if within is None else _within(found, logits, within)
    return _judged(ONNX, difference, fits, tokens, greedy.tolist(), "logits")


def _compressed(source: Source, tokenizer: PreTrainedTokenizerBase | None, scratch: Path) -> Answer:
    """Pack what the run rounded, and open that in plain transformers."""
    if importlib.util.find_spec("compressed_tensors") is None:
        return Answer(PACKED, "not installed", f"compressed-tensors is not installed; pip install compressed-tensors=={TESTED}")
    try:
        packing = packing_of(source.folder)
    except CompressoError as error:
        return Answer(PACKED, "not checked", str(error))
    folder = scratch / "packed"
    try:
        model = load_model(source)
        save_packed(model, packing, folder, tokenizer=tokenizer)
        return ask_packed(folder, model, packing, tokenizer)
    except CompressoError as error:
        return Answer(PACKED, "no", str(error))


def ask_llama_cpp(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, engine: str, within: float) -> Answer:
    """Compare a GGUF file in llama.cpp with the live model it was written from. Raises ExportError if it does not open."""
    found = llama_cpp.continue_texts(path, [TEXT], opened.NEW_TOKENS)[0]
    ids = _ids(tokenizer, model.config.vocab_size)
    if found.tokens != ids.tolist():
        return Answer(engine, "no", f"it reads the text as tokens {found.tokens}, transformers as {ids.tolist()}")
    logits, greedy = opened.continued(model, ids)
    difference = float((torch.tensor(found.probabilities[0]) - logits[-1].softmax(-1)).abs().max())
    return _judged(engine, difference, difference <= within, found.greedy, greedy.tolist(), "probabilities")


def _judged(engine: str, difference: float, within: bool, found: Sequence[int], wanted: Sequence[int], what: str) -> Answer:
    """Yes if the difference is allowed; tokens may part where two are equally likely, so they are told and not judged."""
    same = next((step for step, (one, other) in enumerate(zip(found, wanted, strict=True)) if one != other), len(wanted))
    reason = "" if within else f"{what} differ by up to {difference:.2g}"
    return Answer(engine, "yes" if within else "no", reason, difference, same)


def _unasked(engine: str, package: str) -> Answer:
    """An engine that compresso does not open anything in."""
    if importlib.util.find_spec(package) is None:
        return Answer(engine, "not installed", f"{package} is not installed")
    return Answer(engine, "not checked", "compresso opens nothing in it yet")


def _why(stderr: str, code: int) -> str:
    """The last line of a traceback that names an exception."""
    lines = [line for line in stderr.strip().splitlines() if line and not line[0].isspace()]
    named = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception"))]
    return " ".join((named or lines or [f"ended with {code}"])[-1].split())[:300]


def show(answers: Sequence[Answer], as_json: bool) -> None:
    """Print answers, as JSON or one a line."""
    if as_json:
        print(json.dumps([asdict(answer) for answer in answers], indent=2, allow_nan=False))
        return
    width = max(len(answer.engine) for answer in answers)
    for answer in answers:
        told = [answer.reason] if answer.reason else []
        if answer.difference is not None and not answer.reason:
            told.append(f"largest difference {answer.difference:.1g}")
        if answer.same_tokens is not None:
            told.append(f"{answer.same_tokens} of {opened.NEW_TOKENS} greedy tokens the same")
        print(f"{answer.engine:{width}}  {answer.opens:13}  {', '.join(told)}".rstrip())
