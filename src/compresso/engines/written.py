"""A model loaded as a format wants it, and written in that format: what engines open."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compresso.arch.base import arch_for
from compresso.checkpoint.load import load_model
from compresso.checkpoint.source import Source
from compresso.checkpoint.tokenizer import has_tokenizer, load_tokenizer
from compresso.edit.patch import Patch
from compresso.edit.round_inputs import keep_inputs_, round_inputs_
from compresso.edit.stock import as_stock
from compresso.engines.parity import Format, Reference, ids_of, reference_of
from compresso.errors import ExportError
from compresso.formats import packed
from compresso.formats.gguf import save_gguf
from compresso.formats.low_rank import factored_linears, refuse_products, save_low_rank
from compresso.formats.onnx import save_onnx
from compresso.formats.packed import save_packed
from compresso.formats.packing import Packing, packing_of
from compresso.formats.sliced import refuse_cut, save_sliced, sliced_model, slicing_of
from compresso.formats.vllm_deci import save_vllm_deci

_NEEDS = {
    Format.GGUF: ("gguf", "gguf"),
    Format.ONNX: ("onnxscript", "onnx onnxscript"),
    Format.PACKED: ("compressed_tensors", f"compressed-tensors=={packed.TESTED}"),
}
"""The module that writes a format, and what pip calls it."""
_DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass
class Live:
    """A model in memory, and what a format wants to know of it.

    Args:
        model: of a stock class but for compressed-tensors; in float32 for GGUF and ONNX, else in the stored dtype.
        tokenizer: of its folder; None if that holds none.
        packing: what was rounded, and how; of compressed-tensors only.
        folder: that it was read from.
        factored: the linears that svd may have left with a low rank; of low-rank only.
        cut: how its stream is cut, which its forward pass does; of sliced only.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    packing: Packing | None = None
    folder: Path | None = None
    factored: tuple[str, ...] = ()
    cut: Patch | None = None

    @property
    def own_reference(self) -> bool:
        """Whether what is written rounds other numbers than the model's folder holds."""
        return self.packing is not None or bool(self.factored) or self.cut is not None

    def reference(self, dtype: str = "f32") -> Reference:
        """What engines are compared with; the model becomes float32.

        Args:
            dtype: that the written weights have; of packed, factored and sliced weights, the stored one counts.
        """
        ids = ids_of(self.tokenizer, self.model.config.vocab_size)
        if self.factored or self.cut is not None:
            dtype = _DTYPES[self.model.dtype]
        if self.cut is not None:
            rounded = reference_of(sliced_model(self.model, self.cut), ids, dtype)  # weights were on no grid before
            exact = reference_of(self.model.float(), ids, dtype)
            return replace(exact, rounding=float((rounded.logits - exact.logits).abs().max()))
        if self.packing is None:
            return reference_of(self.model.float(), ids, dtype)
        stored = _DTYPES[self.model.dtype]
        exact = reference_of(self.model.float(), ids, stored)
        if not self.packing.inputs:
            return exact
        round_inputs_(self.model, self.packing.inputs, self.packing.linears)
        rounded = reference_of(self.model, ids, exact.dtype)
        keep_inputs_(self.model)
        return replace(rounded, rounding=float((rounded.logits - exact.logits).abs().max()))


def missing_writer(written: Format) -> str | None:
    """Why a format cannot be written here, with the cure; None if it can."""
    module, package = _NEEDS.get(written, ("torch", "torch"))
    return (
        None if importlib.util.find_spec(module) else f"{package.split('=')[0]} is not installed; pip install {package}"
    )


def load_for(written: Format, source: Source) -> Live:
    """Read a model as a format wants it.

    Raises:
        ExportError: nothing in it was rounded, which compressed-tensors needs, left with a low rank, which low-rank
            needs, or cut, which sliced needs; or its linears are products, or its stream is cut, which the format does
            not hold.
        CheckpointError: it cannot be read.
    """
    if written is not Format.CHECKPOINT:
        refuse_products(source.config.model_type, written)
    if written not in (Format.CHECKPOINT, Format.SLICED):
        refuse_cut(source.folder, written)
    cut = slicing_of(source.folder) if written is Format.SLICED else None
    factored = factored_linears(source.folder) if written is Format.LOW_RANK else ()
    packing = packing_of(source.folder) if written is Format.PACKED else None
    tokenizer = load_tokenizer(source) if has_tokenizer(source) else None
    stored = written in (Format.PACKED, Format.DECI, Format.LOW_RANK, Format.SLICED)
    model = load_model(source, dtype=None if stored else torch.float32)
    kept = written in (Format.CHECKPOINT, Format.PACKED, Format.LOW_RANK)  # of the class that the folder says
    live = model if kept else as_stock(model)
    if cut is not None:
        cut.apply_(live)
    return Live(live, tokenizer, packing, source.folder, factored, cut)


def write(
    written: Format,
    model: Live,
    output: Path,
    *,
    dtype: str = "f32",
    force: bool = False,
    check: Callable[[Path], None] | None = None,
) -> str:
    """Write a model, whole or not at all, and return the architecture that the format calls it.

    Args:
        written: any format but the checkpoint, which is there.
        output: a file for GGUF, else a folder.
        dtype: of GGUF and ONNX.
        force: replace what is there.
        check: looks at what was written before it takes its name; what it raises leaves nothing behind.

    Raises:
        ExportError: the format cannot hold the model, or the package that writes it is missing.
        CheckpointError: the output may not be written.
    """
    if written is Format.PACKED:
        assert model.packing is not None
        save_packed(
            model.model,
            model.packing,
            output,
            tokenizer=model.tokenizer,
            force=force,
            check=check,
            source=model.folder,
        )
        return model.model.config.model_type
    if written is Format.LOW_RANK:
        return save_low_rank(
            model.model,
            model.factored,
            output,
            tokenizer=model.tokenizer,
            force=force,
            check=check,
            source=model.folder,
        )
    if written is Format.SLICED:
        assert model.cut is not None
        return save_sliced(
            model.model,
            model.cut,
            output,
            tokenizer=model.tokenizer,
            force=force,
            check=check,
            source=model.folder,
        )
    stock = model.model
    shapes = arch_for(stock.config).shapes(stock)
    if written is Format.GGUF:
        if model.tokenizer is None:
            raise ExportError("it has no tokenizer, which a GGUF file wants")
        return save_gguf(stock, shapes, output, model.tokenizer, dtype, force, check)
    if written is Format.ONNX:
        save_onnx(stock, shapes, output, model.tokenizer, dtype=dtype, force=force, check=check, source=model.folder)
        return stock.config.model_type
    save_vllm_deci(stock, shapes, output, model.tokenizer, force=force, check=check, source=model.folder)
    return "DeciLM"
