"""Opening a written checkpoint in a fresh process and comparing its logits with those of the model it was written from.

Run as `python -m compresso.formats.reopen`, this file is also that fresh process: what it knows of the model is on
disk.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from compresso.arch.outputs import outputs
from compresso.checkpoint.code import refuse_code
from compresso.checkpoint.kinds import auto_class
from compresso.checkpoint.scratch import scratch_folder
from compresso.edit.rounding import ROUNDINGS, full_precision, rounding_of
from compresso.errors import ExportError, ResourceError, quoted


def reopen_and_compare(
    folder: Path | str,
    model: PreTrainedModel,
    ids: Tensor,
    atol: float,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
) -> float:
    """Open `folder` in a fresh Python process and return the largest difference of its logits from the live model's.

    Both run in `dtype` on the same device; the live model's weights are rounded to the stored dtype first, and restored
    after. A large model is compared with less memory in its own dtype.

    Args:
        ids: token ids [batch, seq], or pixel values [batch, channels, height, width] for a model that reads images.
        atol: largest difference allowed, where roundings do not explain a larger one in this model.
        device: where the fresh process computes; None for the live model's device.

    Raises ExportError if the folder does not open, or its logits differ by more than `atol` or in shape; ResourceError
    if memory is short.
    """
    folder = Path(folder).resolve()
    stored = getattr(torch, json.loads((folder / "config.json").read_text())["dtype"])
    with scratch_folder() as scratch:
        given, result = scratch / "ids.safetensors", scratch / "logits.safetensors"
        save_file({"ids": ids.cpu().contiguous()}, given)
        name = str(dtype).removeprefix("torch.")
        package_root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(part for part in (package_root, os.environ.get("PYTHONPATH")) if part)
        done = subprocess.run(
            [
                sys.executable,
                "-P",
                "-m",
                "compresso.formats.reopen",
                str(folder),
                given,
                result,
                name,
                device or str(model.device),
            ],
            env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        last = quoted((done.stderr.strip().splitlines() or [""])[-1])
        if done.returncode < 0 or "OutOfMemory" in last or "MemoryError" in last:
            raise ResourceError(
                f"reopening {folder} ended by signal or lack of memory ({done.returncode}: {last}). Free memory and try"
                " again."
            )
        if done.returncode:
            raise ExportError(f"{folder} does not open in a fresh process: {last}")
        found = load_file(result)["logits"]
    allowed = atol
    with _as_stored(model, stored, dtype), full_precision():
        wanted = outputs(model, ids.to(model.device)).cpu()
        if found.shape != wanted.shape:
            raise ExportError(f"{folder} reads back with logits {list(found.shape)} instead of {list(wanted.shape)}.")
        worst = float((found - wanted).abs().max())
        if not worst <= atol:  # also for NaN
            compute = lambda: outputs(model, ids.to(model.device)).cpu()  # noqa: E731
            allowed = max(atol, ROUNDINGS * rounding_of(model, compute, wanted))
    if not worst <= allowed:
        raise ExportError(
            f"{folder} reads back differently: logits differ by up to {worst:.3g}, allowed is {allowed:.3g}."
        )
    return worst


@contextmanager
def _as_stored(model: PreTrainedModel, stored: torch.dtype, dtype: torch.dtype) -> Iterator[None]:
    """The model in eval mode with its parameters rounded to one dtype and computing in another;
    as before on leaving.
    """
    training, before = model.training, [(parameter, parameter.data) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, data in before:
            parameter.data = data.to(stored).to(dtype)
        yield
    finally:
        model.train(training)
        for parameter, data in before:
            parameter.data = data


def _main(folder: str, given: str, result: str, dtype: str, device: str) -> None:
    refuse_code(Path(folder))
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model: PreTrainedModel = auto_class(config).from_pretrained(
        folder, dtype=getattr(torch, dtype), local_files_only=True, trust_remote_code=False
    )
    model.to(torch.device(device))  # pyright: ignore[reportArgumentType]  # the library's wrapper hides the signature
    with full_precision():
        logits = outputs(model, load_file(given)["ids"].to(device)).cpu()
    save_file({"logits": logits.contiguous()}, result)


if __name__ == "__main__":
    _main(*sys.argv[1:])
