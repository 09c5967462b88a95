"""Pictures a second of models that see pictures, one after the other as a camera gives them, timed in turn in one
process.

Forwards before the first that counts warm up (the public code of arXiv 2309.02617 takes none), and the clock of a GPU
waits for what it was given. In every round each model has its turn, and a speed-up is taken within each round.
"""

from collections.abc import Mapping
from statistics import median

import torch
from transformers import PreTrainedModel

from compresso.arch.outputs import any_input
from compresso.errors import DataError
from compresso.metrics.record import Environment, Measurement, Setting
from compresso.metrics.timed_generation import Stopwatch, stopwatch

WARMUP, FRAMES, ROUNDS = 10, 10, 5


@torch.inference_mode()
def frame_measurements(
    models: Mapping[str, PreTrainedModel],
    rounds: int = ROUNDS,
    frames: int = FRAMES,
    warmup: int = WARMUP,
    clock: Stopwatch | None = None,
) -> dict[str, tuple[Measurement, ...]]:
    """Frames a second of each model at its own size of picture, the median over rounds, `low` and `high` the extremes;
    of all but the first also the speed-up against it.

    Args:
        models: name -> model; all on one device. Their modes are put back.
        rounds: that count.
        frames: of a round, one at a time.
        warmup: forwards of each model before the first round.
        clock: None for that of the device.

    Returns by name "frames" (frames/s) and "frames_speedup" (1). Raises DataError for a number below 1.
    """
    if not models or min(rounds, frames, warmup) < 1:
        raise DataError(f"{len(models)} models, rounds={rounds}, frames={frames}, warmup={warmup}: at least 1 wanted")
    first, device = next(iter(models)), next(iter(models.values())).device
    clock, were = clock or stopwatch(device), {name: model.training for name, model in models.items()}
    seen = {name: any_input(model.config).to(device, model.dtype) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for name, model in models.items():
        model.eval()
        for _ in range(warmup):
            model(pixel_values=seen[name])
    for _ in range(rounds):
        for name, model in models.items():

            def work(model: PreTrainedModel = model, name: str = name) -> None:
                for _ in range(frames):
                    model(pixel_values=seen[name])

            seconds[name].append(clock(work))
    for name, model in models.items():
        model.train(were[name])
    found: dict[str, tuple[Measurement, ...]] = {}
    for name, taken in seconds.items():
        here = Environment.here(device, models[name].dtype)
        size = " x ".join(map(str, seen[name].shape[-2:]))
        protocol: dict[str, Setting] = {"size": size, "batch": 1, "frames": frames, "rounds": rounds, "warmup": warmup}
        found[name] = (_over("frames", [frames / one for one in taken], "frames/s", here, protocol),)
        if name != first:
            ratios = [before / after for before, after in zip(seconds[first], taken, strict=True)]
            found[name] += (_over("frames_speedup", ratios, "1", here, protocol),)
    return found


def _over(
    name: str, values: list[float], unit: str, environment: Environment, protocol: dict[str, Setting]
) -> Measurement:
    """The median over rounds."""
    return Measurement(
        name=name,
        value=median(values),
        unit=unit,
        how="measured",
        low=min(values),
        high=max(values),
        n=len(values),
        protocol=protocol,
        environment=environment,
    )
