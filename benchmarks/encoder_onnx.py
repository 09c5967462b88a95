"""How fast an exported encoder is in ONNX Runtime: folders of `compresso export --format onnx`, timed in turn.

    compresso export CHECKPOINT --format onnx --output FULL
    compresso export CHECKPOINT --format onnx --dtype int8 --output INT8
    python benchmarks/encoder_onnx.py FULL INT8 [--threads 1] [--rounds 20]

Both answer the same random ids; a round times each once, and the ratio is the median over rounds of the first folder's
seconds over the other's. What is measured stands in results/encoder_onnx.json.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from common import machine, write

SHAPES = ((1, 32), (1, 128), (16, 64))
VOCABULARY = 30522


def opened(folder: Path, threads: int) -> onnxruntime.InferenceSession:
    """A graph on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def asked(session: onnxruntime.InferenceSession, batch: int, length: int) -> Callable[[], Any]:
    """A call on texts of random tokens."""
    ids = np.random.default_rng(0).integers(1000, VOCABULARY, (batch, length))
    whole = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    given = {one.name: whole[one.name] for one in session.get_inputs()}
    return lambda: session.run(None, given)[0]


def main() -> None:
    """Time both folders and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("full", type=Path)
    parser.add_argument("int8", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    sessions = [opened(folder, given.threads) for folder in (given.full, given.int8)]
    found: list[dict[str, Any]] = []
    for batch, length in SHAPES:
        calls = [asked(session, batch, length) for session in sessions]
        apart = float(np.abs(calls[0]() - calls[1]()).max())
        times: list[list[float]] = [[], []]
        for _ in range(given.rounds):
            for call, seconds in zip(calls, times, strict=True):
                begun = time.process_time()  # other processes share this machine's cores
                call()
                seconds.append(time.process_time() - begun)
        ratios = [full / int8 for full, int8 in zip(*times, strict=True)]
        found.append(
            {
                "batch": batch,
                "tokens": length,
                "full_ms": 1000 * statistics.median(times[0]),
                "int8_ms": 1000 * statistics.median(times[1]),
                "ratio": statistics.median(ratios),
                "ratios_10_to_90": [sorted(ratios)[len(ratios) // 10], sorted(ratios)[-1 - len(ratios) // 10]],
                "largest_logit_difference": apart,
            }
        )
        print(found[-1], flush=True)
    sizes = [sum(path.stat().st_size for path in folder.glob("model.onnx*")) for folder in (given.full, given.int8)]
    facts = {"clock": "processor time", "threads": given.threads, "rounds": given.rounds, "shapes": found}
    write("encoder_onnx", {**facts, "bytes": sizes, "onnxruntime": onnxruntime.__version__, "machine": machine()})


if __name__ == "__main__":
    main()
