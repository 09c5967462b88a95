"""Writing an encoder of texts, or a model of pictures, with a head as one ONNX graph, through torch's exporter.

    input_ids, attention_mask, and token_type_ids where the model has some      [batch, seq], int64
    pixel_values                    of a model of pictures [batch, channels, height, width], float32; only the batch is
                                    dynamic
    logits                          [batch, classes]; of a masked language model [batch, seq, vocabulary]; of a
                                    segmenter [batch, classes, height, width]
    start_logits, end_logits        of a model that finds answers, each [batch, seq]

Sizes are dynamic; a row of another length is padded on its right and masked. f16, of a model of pictures, is weights
and all that is computed, as the code of arXiv 2309.02617 has it: the model is traced in float16.
"""

import copy
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import AutoModelForQuestionAnswering, PreTrainedModel, PreTrainedTokenizerBase

from compresso.arch.outputs import any_input
from compresso.checkpoint.atomic import new_folder
from compresso.checkpoint.kinds import auto_class
from compresso.formats.beside import write_beside
from compresso.formats.onnx import ROUNDINGS, Rounding, quiet, untraced, without_sources, write_graph
from compresso.formats.onnx_pictures import calibrated


class _Logits(nn.Module):
    """An encoder with a head as a function of tensors alone; in half precision it still reads and gives float32."""

    def __init__(self, model: PreTrainedModel, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """The outputs, in the order of `output_names`."""
        half = self.model.dtype is torch.float16
        seen = [one.half() if half and one.is_floating_point() else one for one in given]
        result = self.model(**dict(zip(self.names, seen, strict=True)))
        found = [getattr(result, name) for name in output_names(self.model)]
        return tuple(one.float() if half else one for one in found)


def input_names(model: PreTrainedModel) -> tuple[str, ...]:
    """What the graph of an encoder reads."""
    if model.main_input_name == "pixel_values":
        return ("pixel_values",)
    types = ("token_type_ids",) if getattr(model.config, "type_vocab_size", 1) > 1 else ()
    return ("input_ids", "attention_mask", *types)


def output_names(model: PreTrainedModel) -> tuple[str, ...]:
    """What the graph of an encoder gives."""
    finds = auto_class(model.config) is AutoModelForQuestionAnswering
    return ("start_logits", "end_logits") if finds else ("logits",)


def save_onnx_encoder(
    model: PreTrainedModel,
    folder: Path | str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: str = "f32",
    force: bool = False,
    check: Callable[[Path], None] | None = None,
    source: Path | None = None,
    pictures: Tensor | None = None,
) -> None:
    """Write `model.onnx`, config and tokenizer; `folder` is complete or untouched.

    Args:
        model: live, of a stock class, float32.
        folder: where to.
        tokenizer: written beside it.
        dtype: "f32", "int8", or "f16" of a model of pictures.
        force: replace a folder that is not empty.
        check: looks at the written folder before it takes its name; what it raises leaves nothing behind.
        source: the folder that the model came from; what it holds beside weights and config is carried over.
        pictures: pixel values that activations are scaled by where a model of pictures is written in int8 [n, channels,
            height, width], float32; None for scales that are taken as numbers come.

    Raises ExportError if onnx is not installed, the dtype is unknown or torch cannot trace the model.
    """
    with new_folder(folder, force) as temporary:
        roundings = _roundings(model, pictures)
        write_graph(lambda: _traced(model.eval(), half=dtype == "f16"), model, temporary, dtype, roundings)
        config = {**json.loads(model.config.to_json_string()), "architectures": [type(model).__name__]}
        config["compresso_inputs"] = list(input_names(model))
        write_beside(temporary, config, model, tokenizer, source)
        if check is not None:
            check(temporary)


def _roundings(model: PreTrainedModel, pictures: Tensor | None) -> Mapping[str, Rounding | None]:
    """How a graph is written, by dtype."""
    if model.main_input_name != "pixel_values":
        return ROUNDINGS
    static = {} if pictures is None else {"int8": partial(calibrated, pictures=pictures)}
    return {**ROUNDINGS, "f16": None, **static}


@torch.no_grad()
def _traced(model: PreTrainedModel, half: bool) -> Any:
    """The exporter's program; of a copy in float16 if asked. Raises ExportError if it cannot follow the forward."""
    model = copy.deepcopy(model).half() if half else model
    names = input_names(model)
    ids = torch.ones(2, 5, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    given = (ids, mask, torch.zeros_like(ids))[: len(names)]
    shape = {0: Dim("batch_size"), 1: Dim("sequence_length")}
    if model.main_input_name == "pixel_values":
        given, shape = (any_input(model.config).expand(2, -1, -1, -1).contiguous(),), {0: Dim("batch_size")}
    try:
        with quiet():
            program = torch.onnx.export(
                _Logits(model, names).eval(),
                given,
                dynamo=True,
                input_names=list(names),
                output_names=list(output_names(model)),
                dynamic_shapes=(tuple(shape for _ in names),),
                verbose=False,
            )
            return without_sources(program)
    except Exception as error:  # the exporter fails in any way on what it cannot follow
        raise untraced(model, error) from error
