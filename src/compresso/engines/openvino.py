"""Running a written ONNX folder in OpenVINO: the same graph, the same cache."""

from pathlib import Path
from typing import Any

import numpy as np

from compresso.engines.onnx_runtime import OnnxEngine, OnnxModel
from compresso.formats.onnx import GRAPH, library


def names_read(compiled: Any) -> set[str]:
    """All names of what a compiled graph reads. OpenVINO drops the casts at the edge of a graph in half precision, and
    an input has the names of both sides then, of which `any_name` may give the one that nobody knows.
    """
    return {name for one in compiled.inputs for name in one.names}


class OpenVinoModel(OnnxModel):
    """A folder that `save_onnx` wrote, open in OpenVINO on the CPU; used like an `OnnxModel`.

    Args:
        folder: with `model.onnx` and `config.json`.
        threads: of a product; 0 for as many as there are cores.

    Raises ExportError if openvino is not installed.
    """

    def _open(self, folder: Path, threads: int) -> set[str]:
        core = library("openvino").Core()
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"} | (
            {"INFERENCE_NUM_THREADS": threads} if threads else {}
        )
        self._compiled: Any = core.compile_model(core.read_model(str(folder / GRAPH)), "CPU", settings)
        return names_read(self._compiled)

    def _run(self, given: dict[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        found = self._compiled(given)
        return [found[one].copy() for one in self._compiled.outputs]


OPENVINO = OnnxEngine(
    "OpenVINO, as ONNX",
    "OpenVINO",
    "openvino",
    OpenVinoModel,
    "compresso export {folder} --format onnx --output {folder}-onnx  # the same files",
)
ENGINES = (OPENVINO,)
