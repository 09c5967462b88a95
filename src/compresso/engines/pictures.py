"""An ONNX graph of a model of pictures in ONNX Runtime and OpenVINO: its logits beside the live model's, how often both
name the same class, and what it takes in a process with a small board's memory.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compresso.checkpoint.scratch import scratch_folder
from compresso.engines.encoder import EncoderReference, encoder_logits, encoder_parity
from compresso.engines.onnx_runtime import ONNX, OnnxEngine
from compresso.engines.openvino import OPENVINO
from compresso.engines.parity import Parity
from compresso.errors import quoted
from compresso.formats.onnx import GRAPH

RUNTIMES = (ONNX, OPENVINO)
LIMIT = 4_000_000_000
"""Bytes that a process may map for itself: the memory of the boards that arXiv 2309.02617 aims at."""
WARMUP, FRAMES, ROUNDS = 10, 10, 5
AGREEING = 0.99
"""The share of equal classes below which a graph is warned of."""
_SCRIPT = Path(__file__).with_name("picture_process.py")


@dataclass(frozen=True)
class Run:
    """What a graph takes.

    Args:
        frames: pictures a second, the median over rounds.
        low, high: the least and the most of a round.
        processor_ms: processor time of a picture, of all threads, the median over rounds.
        peak: largest resident bytes of the whole process.
        limit: bytes that the process might map.
    """

    frames: float
    low: float
    high: float
    processor_ms: float
    peak: int
    limit: int


def agreement(found: Tensor, wanted: Tensor) -> float:
    """The share of pictures, or of pixels, whose likeliest class is the same by both logits [batch, classes, ...]."""
    return float((found.argmax(1) == wanted.argmax(1)).double().mean())


def ran(engine: OnnxEngine, folder: Path, pictures: Tensor, limit: int = LIMIT) -> Run | str:
    """Run a graph picture by picture, by torch's number of threads, in a process with a limit of memory; why not, where
    it fails.

    Args:
        engine: of `RUNTIMES`.
        folder: with the graph.
        pictures: pixel values [n, channels, height, width], float32, taken in turn.
        limit: bytes of RLIMIT_DATA.
    """
    with scratch_folder() as scratch:
        np.save(scratch / "pictures.npy", pictures.float().numpy())
        order: dict[str, Any] = {"graph": str(Path(folder, GRAPH).resolve()), "engine": engine.program, "limit": limit}
        order |= {"pictures": str(scratch / "pictures.npy"), "threads": torch.get_num_threads()}
        order |= {"warmup": WARMUP, "frames": FRAMES, "rounds": ROUNDS}
        done = subprocess.run(
            [sys.executable, "-P", str(_SCRIPT), json.dumps(order)],
            env=os.environ | {"OMP_NUM_THREADS": str(order["threads"])},
            cwd=scratch,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        last = quoted((done.stderr.strip().splitlines() or [""])[-1], 300)
        said = f": {last}" if last else ""
        return f"ended with code {done.returncode} under a limit of {limit / 1e9:.3g} GB{said}"
    found: Mapping[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    each = [FRAMES / seconds for seconds in found["seconds"]]
    busy = median(found["processor_seconds"]) / FRAMES * 1000
    return Run(median(each), min(each), max(each), busy, found["peak"], limit)


def looked_at(engine: OnnxEngine, folder: Path, reference: EncoderReference, *, agreed: bool) -> dict[str, Any]:
    """What an engine makes of a folder, as facts: `opens`, `reason`, `difference`; and where it opens `agreement` (None
    unless `agreed`), `frames_per_s`, `frames_low`, `frames_high`, `processor_ms`, `peak_bytes`, `limit_bytes`, or why
    it is `not_run`.
    """
    if (missing := engine.missing()) is not None:
        return {"opens": "not installed", "reason": missing, "difference": None}
    parity: Parity = encoder_parity(engine, folder, reference)
    facts: dict[str, Any] = {"opens": parity.opens, "reason": parity.reason, "difference": parity.difference}
    if parity.opens != "yes":
        return facts
    found = encoder_logits(engine, folder, reference.given)
    facts["agreement"] = agreement(found, reference.logits) if agreed else None
    taken = ran(engine, folder, reference.given["pixel_values"])
    if isinstance(taken, str):
        return {**facts, "not_run": taken}
    return {
        **facts,
        "frames_per_s": taken.frames,
        "frames_low": taken.low,
        "frames_high": taken.high,
        "processor_ms": taken.processor_ms,
        "peak_bytes": taken.peak,
        "limit_bytes": taken.limit,
    }
