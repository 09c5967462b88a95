"""A written ONNX graph of a model of pictures in 8 bits, weights and activations, by calibration pictures.

The rounding is static: what convolutions and matrix products read has a scale, and each row of weights has one (ONNX
Runtime's own quantizer, pairs of QuantizeLinear and DequantizeLinear, which OpenVINO reads, too). A scale covers the
magnitudes of all but one in 10,000 values that the calibration pictures show: single far ones would make the steps of
all others coarser. Weights take 7 of their 8 bits: without VNNI a processor adds pairs of products in 16 bits,
where 8 would overflow. The first layer, which reads colours, and the last, which makes logits, stay float32, as do
norms, softmax and activation functions.
"""

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from compresso.formats.onnx import library, quiet

_ROUNDED = ("Conv", "MatMul", "Gemm")
_BINS, _LEAST = 2048, 1e-30
"""Of each tensor's magnitudes, and the largest of them that is no zero."""
COVERED = 99.99
"""Percent of a tensor's values whose magnitude its scale covers."""


def calibrated(whole: Path, graph: Path, pictures: Tensor) -> None:
    """Write a graph in 8 bits.

    Args:
        whole: the graph in float32.
        graph: where to.
        pictures: pixel values by which activations are scaled [n, channels, height, width], float32, n > 0.

    Raises ExportError if a library is not installed.
    """
    quantization = library("onnxruntime.quantization")
    utilities = library("onnxruntime.quantization.quant_utils")
    folded = whole.with_name("folded.onnx")
    with quiet():
        shapes = library("onnxruntime.quantization.shape_inference")
        shapes.quant_pre_process(str(whole), str(folded), skip_symbolic_shape=True)
        ranges = _ranges(folded, pictures)
        model = utilities.load_model_with_shape_infer(folded)
        names = [node.name for node in model.graph.node if node.op_type in _ROUNDED]
        quantizer = quantization.QDQQuantizer(
            model,
            per_channel=True,
            reduce_range=True,
            weight_qType=quantization.QuantType.QInt8,
            activation_qType=quantization.QuantType.QUInt8,
            tensors_range=ranges,
            nodes_to_quantize=[],
            nodes_to_exclude=[*names[:1], *names[-1:]],
            op_types_to_quantize=list(_ROUNDED),
            extra_options={},
        )
        quantizer.quantize_model()
        quantizer.model.save_model_to_file(str(graph))
    for path in whole.parent.glob("folded.onnx*"):
        path.unlink()


def _ranges(folded: Path, pictures: Tensor) -> Any:
    """The range of each tensor that is rounded, as the quantizer takes it. The pictures are shown one by one, where
    `quantize_static` keeps all that a network computes of all of them, which is gigabytes.

    They are shown twice, for the largest magnitudes and for how many lie below: left alone, the calibrator takes its
    bins from what it sees of the first picture, and cannot where that is nearly constant, or runs out of memory where
    later ones are far larger.
    """
    calibrate = library("onnxruntime.quantization.calibrate")

    def shown(method: Any, bins: dict[str, Any] | None = None, **options: Any) -> Any:
        """A calibrator that saw all pictures; bins: to begin with, by tensor."""
        path = str(folded.with_name("folded.onnx.shown"))
        calibrator = calibrate.create_calibrator(folded, list(_ROUNDED), path, method, extra_options=options)
        if bins is not None:
            calibrator.collector = calibrate.HistogramCollector("percentile", True, _BINS, None, COVERED, None)
            calibrator.collector.histogram_dict.update(bins)
        for picture in pictures.float().numpy():
            calibrator.collect_data(_Reader(picture))
        return calibrator.compute_data()

    with redirect_stdout(StringIO()):  # it prints what it does
        bins: dict[str, Any] = {}
        for name, one in shown(calibrate.CalibrationMethod.MinMax).items():
            low, high = np.min(one.range_value[0]), np.max(one.range_value[1])
            edges = np.linspace(0, max(abs(float(low)), abs(float(high)), _LEAST), _BINS + 1, dtype=np.float32)
            bins[name] = (np.zeros(_BINS, dtype=np.int64), edges, low, high)
        return shown(calibrate.CalibrationMethod.Percentile, bins, percentile=COVERED, num_bins=_BINS)


class _Reader:
    """One picture [channels, height, width], as the quantizer asks for its data; its own base class only names this
    method.
    """

    def __init__(self, picture: np.ndarray[Any, Any]) -> None:
        self._left: list[np.ndarray[Any, Any]] = [picture]

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        """The picture by the name of the graph's input; None behind it."""
        return {"pixel_values": self._left.pop()[None]} if self._left else None
