"""The parity check of an encoder of texts, or a model of pictures, with a head: its folder in a fresh process, also
with packed weights, and its ONNX graph in ONNX Runtime and OpenVINO, on texts of different lengths side by side.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.arch.outputs import any_input, outputs
from compresso.checkpoint.load import load_model
from compresso.checkpoint.source import Source
from compresso.checkpoint.tokenizer import has_tokenizer, load_tokenizer
from compresso.data.batches import pad_id
from compresso.edit.round_inputs import keep_inputs_, round_inputs_
from compresso.engines.onnx_runtime import ONNX, WITHIN, OnnxEngine
from compresso.engines.openvino import OPENVINO, names_read
from compresso.engines.parity import TEXT, Format, Parity, within_rounding
from compresso.engines.transformers import OWN, PACKED
from compresso.engines.written import Live, missing_writer
from compresso.errors import CompressoError, quoted
from compresso.formats.onnx import GRAPH, library
from compresso.formats.onnx_encoder import input_names, save_onnx_encoder
from compresso.formats.reopen import reopen_and_compare

TEXTS = (TEXT, "It was all right.", "No.")
REOPENED_WITHIN = 1e-3
_PICTURES = 2
"""Side by side, as a camera gives few."""


@dataclass(frozen=True)
class EncoderReference:
    """What an encoder with a head computes, in float32.

    Args:
        given: what it reads, by name, each [batch, seq], int64, or pixel values of noise.
        logits: [batch, classes], [batch, seq, vocabulary], or [batch, seq, 2] of starts and ends.
        dtype: that the written weights have: f32, f16 or int8.
    """

    given: dict[str, Tensor]
    logits: Tensor
    dtype: str = "f32"


@torch.no_grad()
def encoder_reference(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: str = "f32",
    pictures: Tensor | None = None,
) -> EncoderReference:
    """What a live float32 encoder says of a few texts with padding, or of ids that it has; or of pictures, pixel values
    [n, channels, height, width], noise where none are given.
    """
    if model.main_input_name == "pixel_values":
        noise = torch.cat([any_input(model.config), any_input(model.config).flip(-1)])
        seen = {"pixel_values": noise if pictures is None else pictures}
        return EncoderReference(seen, outputs(model.eval(), seen), dtype)
    if tokenizer is None:
        ids = torch.arange(24).reshape(2, 12) * 7919 % int(model.config.vocab_size)
        mask = torch.ones_like(ids)
        mask[1, 7:] = 0
    else:
        made = tokenizer(list(TEXTS), padding=True, truncation=True, max_length=64, return_tensors="pt")
        mask = made["attention_mask"]
        ids = made["input_ids"].where(mask == 1, pad_id(tokenizer, int(model.config.vocab_size)))
    names = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    given = {name: names[name] for name in input_names(model)}
    return EncoderReference(given, outputs(model.eval(), given), dtype)


def encoder_parity(engine: OnnxEngine, folder: Path, reference: EncoderReference) -> Parity:
    """Compare an ONNX folder in an engine with the live model it was written from."""
    wanted = reference.logits
    try:
        found = encoder_logits(engine, folder, reference.given)
    except RuntimeError as error:  # of the engine
        return Parity(engine.name, "no", quoted(error))
    if found.shape != wanted.shape:
        return Parity(engine.name, "no", f"logits are {list(found.shape)} instead of {list(wanted.shape)}")
    difference, within = float((found - wanted).abs().max()), WITHIN.get(reference.dtype)
    fits = bool(found.isfinite().all()) if within is None else within_rounding(found, wanted, within)
    reason = "" if fits else f"logits differ by up to {difference:.2g}"
    return Parity(engine.name, "yes" if fits else "no", reason, difference)


def encoder_logits(engine: OnnxEngine, folder: Path, given: dict[str, Tensor]) -> Tensor:
    """Logits of an ONNX folder, as in `EncoderReference`. Raises RuntimeError of the engine."""
    run, pixels = _RUNS[engine.name](folder), given.get("pixel_values")
    if pixels is None:
        return run(given)
    return torch.cat([run({"pixel_values": two}) for two in pixels.split(_PICTURES)])


def packed_encoder_parity(folder: Path, live: Live) -> Parity:
    """Open a folder with packed weights in a fresh process, and compare it with the model it was written from, which
    becomes float32.

    Where activations are rounded, here and there by steps of slightly different size, a difference of twice what
    rounding them makes is allowed.
    """
    assert live.packing is not None
    model, within = live.model.float().eval(), REOPENED_WITHIN
    ids = encoder_reference(model, live.tokenizer).given["input_ids"][:1]
    if live.packing.inputs:
        exact = outputs(model, ids)
        round_inputs_(model, live.packing.inputs, live.packing.linears)
        within += 2 * float((outputs(model, ids) - exact).abs().max())
    try:
        return Parity(PACKED.name, "yes", "", reopen_and_compare(folder, model, ids, within))
    except CompressoError as error:
        return Parity(PACKED.name, "no", str(error).replace(str(folder.resolve()), "this folder"))
    finally:
        keep_inputs_(model)


def verify_encoder(source: Source, scratch: Path) -> list[Parity]:
    """The parity of every engine with an encoder's folder. scratch: where to write the graph."""
    assert source.folder is not None
    live = load_model(source, dtype=torch.float32)
    reference = encoder_reference(live, load_tokenizer(source) if has_tokenizer(source) else None)
    try:
        ids = next(iter(reference.given.values()))[:1]
        found = [Parity(OWN.name, "yes", "", reopen_and_compare(source.folder, live, ids, REOPENED_WITHIN))]
    except CompressoError as error:
        found = [Parity(OWN.name, "no", str(error))]
    folder = scratch / "onnx"
    lacking = {engine: missing_writer(Format.ONNX) or engine.missing() for engine in (ONNX, OPENVINO)}
    try:
        if None in lacking.values():
            save_onnx_encoder(live, folder)
        for engine, reason in lacking.items():
            found.append(
                encoder_parity(engine, folder, reference)
                if reason is None
                else Parity(engine.name, "not installed", reason)
            )
    except CompressoError as error:
        found += [Parity(engine.name, "no", str(error)) for engine, reason in lacking.items() if reason is None]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found


Opened = Callable[[dict[str, Tensor]], Tensor]
"""An ONNX folder in an engine: what the graph reads, by name -> logits."""


def _onnx_runtime(folder: Path) -> Opened:
    runtime = library("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session: Any = runtime.InferenceSession(str(folder / GRAPH), options, providers=["CPUExecutionProvider"])
    known = {one.name for one in session.get_inputs()}

    def run(given: dict[str, Tensor]) -> Tensor:
        found = session.run(None, {name: ids.numpy() for name, ids in given.items() if name in known})
        return _side_by_side([torch.from_numpy(one) for one in found])

    return run


def _openvino(folder: Path) -> Opened:
    core = library("openvino").Core()
    compiled: Any = core.compile_model(core.read_model(str(folder / GRAPH)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    known = names_read(compiled)

    def run(given: dict[str, Tensor]) -> Tensor:
        found = compiled({name: ids.numpy() for name, ids in given.items() if name in known})
        return _side_by_side([torch.from_numpy(found[one].copy()) for one in compiled.outputs])

    return run


def _side_by_side(found: Sequence[Tensor]) -> Tensor:
    """The graph's one output, or its starts and ends as `outputs` puts them."""
    return found[0] if len(found) == 1 else torch.stack(list(found), -1)


_RUNS: dict[str, Callable[[Path], Opened]] = {ONNX.name: _onnx_runtime, OPENVINO.name: _openvino}
