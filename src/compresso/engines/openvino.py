"""Running a written ONNX folder in OpenVINO: the same graph, the same cache."""

from pathlib import Path
from typing import Any

import numpy as np

from compresso.engines.onnx_runtime import OnnxEngine, OnnxModel
from compresso.formats.onnx import GRAPH, library


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
        return {one.any_name for one in self._compiled.inputs}

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
