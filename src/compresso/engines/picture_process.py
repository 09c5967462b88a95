"""A graph of a model of pictures run as on a small board: one picture after the other, in a process that may take so
much memory and no more. This file is run by its path and imports numpy and one engine.

Argument: JSON with `graph`, `engine` ("ONNX Runtime" or "OpenVINO"), `pictures` (an .npy file [n, channels, height,
width], float32), `limit` (bytes of RLIMIT_DATA, the process' own mappings), `threads`, `warmup`, `frames`, `rounds`.
Printed is JSON: `seconds` and `processor_seconds` of the frames of each round, after the warm-up, and `peak`, the
largest resident bytes of the process, interpreter and libraries included.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main(order: dict[str, Any]) -> dict[str, Any]:
    """Limit, open, run."""
    limit = int(order["limit"])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    import numpy

    pictures = numpy.load(order["pictures"])
    run = _opened(order["engine"], order["graph"], int(order["threads"]))
    for i in range(order["warmup"]):
        run(pictures[i % len(pictures)][None])
    seconds: list[float] = []
    processor: list[float] = []
    for _ in range(order["rounds"]):
        begun, busy = time.perf_counter(), time.process_time()
        for i in range(order["frames"]):
            run(pictures[i % len(pictures)][None])
        seconds.append(time.perf_counter() - begun)
        processor.append(time.process_time() - busy)
    return {"seconds": seconds, "processor_seconds": processor, "peak": _peak()}


def _opened(engine: str, graph: str, threads: int) -> Callable[[Any], Any]:
    """What runs a picture; it returns when the logits are there."""
    if engine == "OpenVINO":
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        compiled: Any = openvino.Core().compile_model(graph, "CPU", settings)
        return lambda picture: compiled({"pixel_values": picture})
    import onnxruntime

    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    session: Any = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return lambda picture: session.run(None, {"pixel_values": picture})


def _peak() -> int:
    """Of this process alone; what it may have inherited from the one that started it is not counted on Linux."""
    status = Path("/proc/self/status")
    lines = status.read_text("utf-8").splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
