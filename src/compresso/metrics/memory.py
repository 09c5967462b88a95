"""Peak memory of loading a model and using it, measured in a process of its own, where nothing else has left anything
behind.

On the CPU: the largest resident size of that process while it loads, reads a prompt and continues it, minus its size
when all libraries were imported and no weight was read. Weights read in place from a mapped file count, as do tensors,
the cache, activations, whatever the allocator keeps and what libraries load on first use (some 10 MB); a page swapped
out does not. On a GPU: the largest sum of tensors that torch held on the device; the CUDA context does not count.

Linux keeps the peak (VmHWM) with the memory itself, so it starts anew in each process; getrusage's ru_maxrss, which a
started process may inherit from the one that started it, is read on other systems only. Run as `python -m
compresso.metrics.memory`, this file is that process.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from compresso import errors
from compresso.arch.outputs import any_input, outputs
from compresso.checkpoint.load import load_model
from compresso.checkpoint.scratch import scratch_folder
from compresso.checkpoint.source import open_source
from compresso.errors import CheckpointError, CompressoError, ResourceError, quoted
from compresso.metrics.pruned_context import hold_context_
from compresso.metrics.record import Environment, Measurement
from compresso.metrics.timed_generation import NEW_TOKENS, PROMPT_TOKENS, prefill_and_decode, prompts

_CURE = "free memory, measure a smaller batch or prompt, or leave this out with --no-memory"


def peak_memory(
    folder: Path | str,
    *,
    batch: int = 1,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    cache: str | None = None,
    whole: bool = False,
) -> Measurement:
    """The most memory that loading a checkpoint, one prefill and one greedy decode take; of a model of pictures,
    loading it and reading one.

    Args:
        folder: the checkpoint.
        batch, prompt_tokens, new_tokens: of the prefill and the decode.
        device: where the model runs.
        dtype: of the weights; None for the stored one.
        seed: of the random prompts.
        cache: a rule by which the cache forgets, as `compresso.load` takes it.
        whole: whether libraries count, too, as they do on a board; on a CPU.

    Returns:
        "memory/peak" (bytes, measured).

    Raises:
        ResourceError: memory did not suffice, or the system ended the process.
        CompressoError: as loading raises it.
    """
    given = {
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "seed": seed,
        "threads": torch.get_num_threads(),
        "cache": cache,
    }
    with scratch_folder() as scratch:
        result = scratch / "peak.json"
        order = {"folder": str(folder), "result": str(result), "device": str(device), "dtype": _name(dtype), **given}
        package_root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(part for part in (package_root, os.environ.get("PYTHONPATH")) if part)
        done = subprocess.run(
            [sys.executable, "-P", "-m", "compresso.metrics.memory", json.dumps(order)],
            env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise _failure(
                Path(folder).name, done.returncode, quoted((done.stderr.strip().splitlines() or [""])[-1], 600)
            )
        found = json.loads(result.read_text("utf-8"))
    counted = (
        "tensors on the device" if torch.device(device).type == "cuda" else "resident size beyond that of the libraries"
    )
    counted = "resident size of the process" if whole else counted
    return Measurement(
        name="memory/peak",
        value=found["whole" if whole else "peak"],
        unit="bytes",
        how="measured",
        protocol={
            "batch": batch,
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "counted": counted,
            "includes": "loading",
            **({} if cache is None else {"cache": cache}),
        },
        seed=seed,
        environment=Environment.here(device, getattr(torch, found["dtype"])),
    )


def _failure(name: str, code: int, last: str) -> CompressoError:
    """The error that a failed process stands for; `last` is the last line it wrote."""
    if code < 0 or code > 128:
        number = -code if code < 0 else code - 128
        killed = ", as the system does when memory runs out" if number == 9 else ""
        return ResourceError(
            f"the process that measured the memory of {name} was ended by signal {number}{killed}; {_CURE}"
        )
    if any(sign in last for sign in ("OutOfMemory", "MemoryError", "can't allocate memory")):
        return ResourceError(f"{name} does not fit into memory while it runs ({last}); {_CURE}")
    kind, _, message = last.partition(": ")
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, CompressoError):
        return known(message)
    return CheckpointError(f"{name} could not be run in a process of its own: {last}")


def _measured(
    folder: str,
    device: str,
    dtype: str | None,
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    seed: int,
    cache: str | None = None,
) -> dict[str, int | str]:
    """What the process of its own does: `peak` in bytes and the `dtype` that the weights had."""
    where = torch.device(device)
    on_gpu = where.type == "cuda"
    source = open_source(folder, packed=True)
    before = 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(where)
    else:
        with suppress(
            OSError
        ):  # not allowed everywhere; then what importing took for a moment counts as the libraries'
            Path("/proc/self/clear_refs").write_text("5")
        before = peak_resident()
    model = load_model(source, getattr(torch, dtype) if dtype else None, where)
    hold_context_(model, source, cache)
    if model.main_input_name == "pixel_values":
        outputs(model, any_input(model.config).repeat(batch, 1, 1, 1).to(where))
    else:
        ids = prompts(batch, prompt_tokens, model.config.vocab_size, seed).to(where)
        prefill_and_decode(model, ids, new_tokens, _untimed)
    peak = torch.cuda.max_memory_allocated(where) if on_gpu else peak_resident() - before
    return {"peak": peak, "whole": peak_resident(), "dtype": str(model.dtype).removeprefix("torch.")}


_highest = 0
"""The largest peak read so far: Linux counts pages on each CPU apart, so its own peak may fall by a few of them."""


def peak_resident() -> int:
    """The largest resident size that this process has had, in bytes."""
    global _highest
    _highest = max(_highest, _system_peak())
    return _highest


def _system_peak() -> int:
    """What the system says is the peak."""
    status = Path("/proc/self/status")
    lines = status.read_text("utf-8").splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _untimed(work: Callable[[], None]) -> float:
    work()
    return 0.0


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _main(given: str) -> int:
    order = json.loads(given)
    result = Path(order.pop("result"))
    torch.set_num_threads(order.pop("threads"))
    try:
        found = _measured(**order)
    except CompressoError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    result.write_text(json.dumps(found), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1]))
