"""The memory of a process that reads one picture with a model that is in memory here."""

from transformers import PreTrainedModel

from compresso.arch.base import arch_for
from compresso.checkpoint.scratch import scratch_folder
from compresso.formats.hf import save_checkpoint
from compresso.metrics.memory import peak_memory
from compresso.metrics.record import Measurement


def picture_memory(model: PreTrainedModel) -> Measurement:
    """Write a model of pictures to a folder that goes again, and measure a process that loads it and reads one picture;
    on a CPU its libraries count, as they do on a board.

    Returns:
        "memory/peak" (bytes, measured).

    Raises:
        CompressoError: no config holds the model, or the process ended before its time.
    """
    with scratch_folder() as scratch:
        folder = scratch / "model"
        save_checkpoint(model, arch_for(model.config).shapes(model), folder)
        return peak_memory(folder, device=model.device, dtype=model.dtype, whole=model.device.type == "cpu")
