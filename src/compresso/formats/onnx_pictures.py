"""A written ONNX graph of a model of pictures in 8 bits, weights and activations, by calibration pictures.

The rounding is static: what convolutions and matrix products read has a scale, between the least and the largest value
that the calibration pictures show, and each row of weights has one (ONNX Runtime's own quantizer, pairs of
QuantizeLinear and DequantizeLinear, which OpenVINO reads, too). Weights take 7 of their 8 bits: without VNNI a
processor adds pairs of products in 16 bits, where 8 would overflow. Norms, softmax and activation functions stay
float32.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from compresso.formats.onnx import library, quiet

_ROUNDED = ("Conv", "MatMul", "Gemm")


def calibrated(whole: Path, graph: Path, pictures: Tensor) -> None:
    """Write a graph in 8 bits.

    Args:
        whole: the graph in float32.
        graph: where to.
        pictures: pixel values by which activations are scaled [n, channels, height, width], float32, n > 0.

    Raises ExportError if a library is not installed.
    """
    quantization = library("onnxruntime.quantization")
    shapes = library("onnxruntime.quantization.shape_inference")
    folded = whole.with_name("folded.onnx")
    with quiet():
        shapes.quant_pre_process(str(whole), str(folded), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(folded),
            str(graph),
            _Reader(pictures),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=list(_ROUNDED),
            per_channel=True,
            reduce_range=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
    for path in whole.parent.glob("folded.onnx*"):
        path.unlink()


class _Reader:
    """Pictures one by one, as the quantizer asks for them; its own base class only names this method."""

    def __init__(self, pictures: Tensor) -> None:
        self._left: Iterator[np.ndarray[Any, Any]] = iter(pictures.float().numpy())

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        """The next picture by the name of the graph's input; None at the end."""
        picture = next(self._left, None)
        return None if picture is None else {"pixel_values": picture[None]}
