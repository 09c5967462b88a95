"""Writing a model as one ONNX graph with a key/value cache, layers of different widths included, through torch's
exporter.

The graph serves the prompt and every token after it: with an empty cache it reads a prompt, with one it goes on. Names
as optimum has them:

    input_ids, attention_mask, position_ids      [batch, seq], [batch, past + seq], [batch, seq]
    past_key_values.{i}.key and .value           [batch, heads of layer i, past, width]
    logits                                       [batch, seq, vocabulary]
    present.{i}.key and .value                   [batch, heads of layer i, past + seq, width]

i counts the attentions that are there: a layer without one has no cache. Where all heads are made of one compressed
vector (DeepSeek's MLA), that and the part with positions are what is kept, as one head of two widths. Sizes are
dynamic; torch traces a cache and a chunk of more than one token, so that nothing is specialised to their absence. int8:
weights of matrix products in 8 bits, activations rounded as they come, by ONNX Runtime's own quantizer. Of a mixture a
token passes the experts that it chose, and no other (`formats/onnx_experts.py`).
"""

import importlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from compresso.arch.base import LayerShape
from compresso.checkpoint.atomic import new_folder
from compresso.errors import ExportError, quoted
from compresso.formats.beside import write_beside
from compresso.formats.onnx_cache import Cache, cache_names, cache_of
from compresso.formats.onnx_experts import experts_apart, mend_splits, translations
from compresso.formats.onnx_rotary import real_numbers

GRAPH = "model.onnx"
Stored = Literal["f32", "int8"]
_APART = 1_000_000_000
"""Bytes of weights from which on they lie in a file beside the graph."""


class _WithCache(nn.Module):
    """A model as a function of tensors alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """Logits, then keys and values of each attention, those of `past` followed by the new ones."""
        cache = DynamicCache()
        for slot in range(len(past) // 2):
            cache.update(past[2 * slot], past[2 * slot + 1], slot)
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        layers: list[Any] = cache.layers
        return (out.logits, *(tensor for layer in layers for tensor in (layer.keys, layer.values)))


def save_onnx(
    model: PreTrainedModel,
    shapes: Sequence[LayerShape],
    folder: Path | str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: str = "f32",
    force: bool = False,
    check: Callable[[Path], None] | None = None,
    source: Path | None = None,
) -> None:
    """Write `model.onnx`, config and tokenizer; `folder` is complete or untouched.

    Args:
        model: live, of a stock class, float32.
        shapes: widths of each layer.
        tokenizer: written beside it.
        dtype: "f32" or "int8".
        force: replace a folder that is not empty.
        check: looks at the written folder before it takes its name; what it raises leaves nothing behind.
        source: the folder that the model came from; what it holds beside weights and config is carried over.

    Raises ExportError if onnx is not installed, the dtype is unknown or torch cannot trace the model.
    """
    cache = cache_of(model, shapes)
    with new_folder(folder, force) as temporary:
        write_graph(lambda: _traced(model.eval(), cache), model, temporary, dtype)
        config = {**json.loads(model.config.to_json_string()), "compresso_cache": cache.fields()}
        write_beside(temporary, config, model, tokenizer, source)
        if check is not None:
            check(temporary)


Rounding = Callable[[Path, Path], None]
"""Writes a graph in fewer bits: the graph in float32, and where to."""


def dynamic(whole: Path, graph: Path) -> None:
    """Write a graph with matrices in 8 bits, activations rounded as they come. Raises ExportError if onnxruntime is not
    installed.
    """
    quantization = library("onnxruntime.quantization")
    with quiet():
        quantization.quantize_dynamic(whole, graph, weight_type=quantization.QuantType.QInt8)


ROUNDINGS: Mapping[str, Rounding | None] = {"f32": None, "int8": dynamic}
"""How a traced graph is written, by dtype; None for one that is written as it was traced."""


def write_graph(
    traced: Callable[[], Any],
    model: PreTrainedModel,
    folder: Path,
    dtype: str,
    roundings: Mapping[str, Rounding | None] = ROUNDINGS,
) -> None:
    """Write what torch's exporter traced as `model.onnx`, in fewer bits if asked. Raises ExportError for an unknown
    dtype and if onnx is not installed.
    """
    if dtype not in roundings:
        raise ExportError(f"unknown dtype '{dtype}' of onnx; known: {', '.join(roundings)}")
    library("onnxscript")
    if (rounding := roundings[dtype]) is not None:
        library("onnxruntime.quantization")
    path = folder / (GRAPH if rounding is None else "whole.onnx")
    traced().save(str(path), external_data=sum(p.nbytes for p in model.parameters()) > _APART)
    if rounding is not None:
        rounding(path, folder / GRAPH)
        for whole in folder.glob("whole.onnx*"):
            whole.unlink()


def without_sources(program: Any) -> Any:
    """What torch's exporter made, with the notes of its nodes emptied: it puts the lines of source there that each node
    came from, with their folders on this machine.
    """
    for graph in (program.model.graph, *program.model.functions.values()):
        for node in graph.all_nodes():
            node.metadata_props.clear()
    return program


def library(name: str) -> Any:
    """A module of onnx' family. Raises ExportError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExportError(f"ONNX needs {name.partition('.')[0]}; pip install onnx onnxscript onnxruntime") from error


@torch.no_grad()
def _traced(model: PreTrainedModel, kept: Cache) -> Any:
    """The exporter's program. Raises ExportError if it cannot follow the forward."""
    batch, seq, past = 2, 3, 4
    ids = torch.zeros(batch, seq, dtype=torch.long)
    positions = torch.arange(past, past + seq).expand(batch, seq)
    mask = torch.ones(batch, past + seq, dtype=torch.long)
    cache = kept.zeros(batch, past)
    rows, new, old = Dim("batch_size"), Dim("sequence_length"), Dim("past_sequence_length")
    chunk = {0: rows, 1: new}
    dynamic = (chunk, {0: rows, 1: Dim.DYNAMIC}, chunk, tuple({0: rows, 2: old} for _ in cache))
    try:
        with quiet(), experts_apart(model), real_numbers(model):
            program: Any = torch.onnx.export(
                _WithCache(model).eval(),
                (ids, mask, positions, *cache),
                dynamo=True,
                input_names=[
                    "input_ids",
                    "attention_mask",
                    "position_ids",
                    *cache_names(len(kept.heads), "past_key_values"),
                ],
                output_names=["logits", *cache_names(len(kept.heads), "present")],
                dynamic_shapes=dynamic,
                custom_translation_table=translations(),
                verbose=False,
            )
            mend_splits(program.model)
            return without_sources(program)
    except Exception as error:  # the exporter fails in any way on what it cannot follow
        raise untraced(model, error) from error


def untraced(model: PreTrainedModel, error: Exception) -> ExportError:
    """What is said where the exporter cannot follow a forward: the reason that its own message of several steps is
    about.
    """
    reason = error if error.__cause__ is None else error.__cause__
    return ExportError(f"torch cannot write {type(model).__name__} as ONNX: {type(reason).__name__}: {quoted(reason)}")


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's and the quantizer's own remarks."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "root")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
