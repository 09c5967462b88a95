"""A checkpoint written in another format, and reopened."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from compresso.arch.base import arch_for
from compresso.checkpoint.atomic import check_output
from compresso.checkpoint.kinds import is_text_encoder, sees
from compresso.checkpoint.overwrite import EXPORTS, first_bytes, refuse_foreign, refuse_foreign_gguf
from compresso.checkpoint.scratch import scratch_beside
from compresso.checkpoint.source import Source, open_source
from compresso.checkpoint.writes_text import refuse_textless
from compresso.commands.export_pictures import export_pictures, said
from compresso.door import public
from compresso.engines.encoder import encoder_parity, encoder_reference, packed_encoder_parity
from compresso.engines.llama_quantize import KINDS, fallbacks, quantize, tool
from compresso.engines.onnx_runtime import ONNX
from compresso.engines.parity import Engine, Format, Parity
from compresso.engines.registry import engine_for
from compresso.engines.transformers import PACKED
from compresso.engines.written import Live, load_for, write
from compresso.errors import CheckpointError, ExportError, deprecated, nearest
from compresso.formats.gguf import library
from compresso.formats.onnx_cache import head_dim
from compresso.formats.onnx_encoder import save_onnx_encoder
from compresso.metrics.size import weight_bytes

log = logging.getLogger(__name__)
FORMATS = ("gguf", "onnx", "compressed-tensors", "vllm-deci", "low-rank", "sliced")
_ENCODERS = ("onnx", "compressed-tensors")
"""Formats that encoders with a head have, too."""


@public
def export(
    model: str | Path,
    output: str | Path,
    *,
    format: str,
    dtype: str | None = None,
    data: str | Path | None = None,
    overwrite: bool = False,
    force: bool | None = None,
) -> dict[str, Any]:
    """Write a folder of safetensors, a GGUF file or a hub id in another format, and open it in the engine where that is
    installed.

    Args:
        model: folder of safetensors, GGUF file or hub id.
        output: the file or folder to write.
        format: gguf (a file), or a folder of onnx, compressed-tensors (of what a stage rounded), vllm-deci, low-rank
            (of what svd left with a low rank) or sliced (of what slicegpt cut).
        dtype: of gguf: f32, f16 (if None), bf16, q8_0, q4_0, or a K-quant such as q4_k_m, made by llama.cpp; of
            onnx: f32 (if None), int8, or f16 of a model of pictures.
        data: pictures of the task of a model of pictures that is written as onnx: half of them scale the activations of
            int8, which are scaled as numbers come without them, and on the others the engines' classes are compared
            with the model's.
        overwrite: replace an earlier export of the same format; a folder with anything else in it is refused.
        force: deprecated: `overwrite`.

    Returns:
        `{"output", "format", "arch", "dtype", "bytes", "checked", "difference", "same_tokens"}`; `checked` says by what
        it was opened, or why it was not; `difference` is the largest of the probabilities after a text, None if
        unchecked. Of a model of pictures also `calibrated_on` and `compared_on` (pictures) and `engines`: by name,
        `agreement` (the share of equal classes), frames a second and the peak of memory in a process of 4 GB.

    Raises:
        ArchError: for a model that writes no text, but for encoders with a head where the format has them.
        CheckpointError: if the model cannot be read or the output may not be written.
        ExportError: if the format cannot hold the model, or the engine reads something else than was written; then no
            file is left.
    """
    if format not in FORMATS:
        raise ExportError(f"--format '{format}' is unknown; {nearest(format, FORMATS)}")
    if force is not None:
        deprecated("force=", "overwrite=")
        overwrite = overwrite or force
    output = Path(output)
    if format == "gguf" and not output.is_dir():
        first_bytes(output)  # a device is refused here
    if overwrite or format == "gguf":  # a file is never told to use an option that would be refused
        _refuse_foreign(output, format)
    source = open_source(model)
    _refuse_textless(source, format)
    if data is not None and not (format == "onnx" and sees(source.config)):
        raise ExportError("--data is pictures for --format onnx of a model of pictures; leave it out")
    if source.file is not None and output.exists() and output.samefile(source.file):
        raise CheckpointError(f"output {output} is the input model. Choose another output.")
    if format != "gguf":  # a folder; a single file may lie beside the weights
        check_output(output, source.folder, overwrite, EXPORTS[format])
    if format == "compressed-tensors":
        if dtype is not None:
            raise ExportError(
                f"--dtype {dtype}: compressed-tensors files have the bits that the run rounded to; leave --dtype out"
            )
        return _packed(source, output, overwrite)
    if format in ("vllm-deci", "low-rank", "sliced"):
        if dtype is not None:
            raise ExportError(f"--dtype {dtype}: {format} keeps the stored one; leave --dtype out")
        return _stored(source, Format(format), output, overwrite)
    if format == "onnx":
        _refuse_dtype(dtype, of_pictures=sees(source.config))
        return _onnx(source, output, dtype or "f32", overwrite, data)
    return _gguf(source, output, dtype or "f16", overwrite)


def show(facts: Mapping[str, Any], as_json: bool) -> None:
    """Print what `export` returned, as JSON or in a line."""
    if as_json:
        print(json.dumps(facts, indent=2, allow_nan=False))
        return
    print(f"{facts['output']}: {facts['bytes']:,} bytes, arch {facts['arch']}, {facts['dtype']}; {facts['checked']}")
    for line in said(facts) if "engines" in facts else ():
        print(f"  {line}")


def _refuse_textless(source: Source, format: str) -> None:
    """Raise ArchError for a model that the engines of a format cannot be asked about."""
    if sees(source.config) and format == "onnx":
        return
    if not is_text_encoder(source.config):
        also = " and encoders of texts with a head, as a run with --task classification writes them"
        refuse_textless(source, f"--format {format} takes causal language models{also if format in _ENCODERS else ''}")
    elif format not in _ENCODERS:
        refuse_textless(source, f"--format {format} takes causal language models; give --format onnx")


def _refuse_foreign(output: Path, format: str) -> None:
    """Raise CheckpointError if what lies at `output` is no export of this format alone."""
    if format != "gguf":
        refuse_foreign(output, EXPORTS[format])
    else:
        refuse_foreign_gguf(output)


def _gguf(source: Source, output: Path, dtype: str, force: bool) -> dict[str, Any]:
    """A GGUF file; K-quants are made by llama.cpp from one in f16."""
    library()
    if dtype not in KINDS:
        return _exported(source, Format.GGUF, output, dtype, force) | {"bytes": output.stat().st_size}
    tool(dtype)
    if output.is_dir() or (output.exists() and not force):
        raise CheckpointError(f"{output} exists. Choose another output, or replace a GGUF file with --overwrite.")
    model = load_for(Format.GGUF, source)
    shapes = arch_for(model.model.config).shapes(model.model)
    for remark in fallbacks(shapes, int(model.model.config.hidden_size), head_dim(model.model)):
        log.warning(remark)
    facts: dict[str, Any] = {"output": str(output), "format": "gguf", "dtype": dtype}
    with scratch_beside(output) as scratch:
        whole, quantized = scratch / "f16.gguf", scratch / "quantized.gguf"
        facts["arch"] = write(Format.GGUF, model, whole, dtype="f16")
        quantize(whole, quantized, dtype)
        _checking(Format.GGUF, model, output, dtype, facts)(quantized)
        quantized.replace(output)
    return facts | {"bytes": output.stat().st_size}


def _refuse_dtype(dtype: str | None, of_pictures: bool) -> None:
    """Raise ExportError for one that no graph of such a model is written in, before weights are read."""
    known = ("f32", "int8", *(("f16",) if of_pictures else ()))
    if dtype is not None and dtype not in known:
        why = "; f16 is for models of pictures" if dtype == "f16" else ""
        raise ExportError(f"--dtype {dtype}: a graph of this model is written in {', '.join(known)}{why}")


def _onnx(source: Source, output: Path, dtype: str, force: bool, data: str | Path | None) -> dict[str, Any]:
    """A folder with an ONNX graph."""
    if sees(source.config):
        facts = export_pictures(source, output, dtype, force, data)
    elif is_text_encoder(source.config):
        facts = _encoder(source, output, dtype, force)
    else:
        facts = _exported(source, Format.ONNX, output, dtype, force)
    size = sum(path.stat().st_size for path in output.glob("model.onnx*"))
    return facts | {"arch": source.config.model_type, "bytes": size}


def _stored(source: Source, written: Format, output: Path, force: bool) -> dict[str, Any]:
    """A folder for vLLM's DeciLM class, with products of low rank, or of a sliced stream."""
    return _exported(source, written, output, None, force) | {"bytes": weight_bytes(output)}


def _packed(source: Source, output: Path, force: bool) -> dict[str, Any]:
    """A folder whose rounded linears are packed."""
    made = _packed_encoder if is_text_encoder(source.config) else _packed_decoder
    return made(source, output, force) | {"bytes": weight_bytes(output)}


def _packed_decoder(source: Source, output: Path, force: bool) -> dict[str, Any]:
    return _exported(source, Format.PACKED, output, None, force)


def _packed_encoder(source: Source, output: Path, force: bool) -> dict[str, Any]:
    """Write an encoder with packed weights and open it in a fresh process."""
    live = load_for(Format.PACKED, source)
    assert live.packing is not None
    facts: dict[str, Any] = {"output": str(output), "format": str(Format.PACKED), "dtype": live.packing.kind}
    check = _opening(PACKED, lambda path: packed_encoder_parity(path, live), output, facts)
    facts["arch"] = write(Format.PACKED, live, output, force=force, check=check)
    return facts


def _exported(source: Source, written: Format, output: Path, dtype: str | None, force: bool) -> dict[str, Any]:
    """Write a format and open it in its engine.

    Args:
        source: the model.
        written: the format.
        output: where to.
        dtype: of GGUF and ONNX; None if the format has that of the weights.
        force: replace what is there.

    Returns:
        What `export` returns, without the bytes.
    """
    model = load_for(written, source)
    stored = str(model.model.dtype).removeprefix("torch.") if model.packing is None else model.packing.kind
    facts: dict[str, Any] = {"output": str(output), "format": str(written), "dtype": dtype or stored}
    check = _checking(written, model, output, dtype or "f32", facts)
    facts["arch"] = write(written, model, output, dtype=dtype or "f32", force=force, check=check)
    return facts


def _encoder(source: Source, output: Path, dtype: str, force: bool) -> dict[str, Any]:
    """Write an encoder's ONNX graph and open it in its engine; returns what `export` returns, without the bytes."""
    live = load_for(Format.ONNX, source)
    facts: dict[str, Any] = {"output": str(output), "format": str(Format.ONNX), "dtype": dtype}

    def parity(path: Path) -> Parity:
        return encoder_parity(ONNX, path, encoder_reference(live.model, live.tokenizer, dtype))

    check = _opening(ONNX, parity, output, facts)
    save_onnx_encoder(live.model, output, live.tokenizer, dtype=dtype, force=force, check=check, source=live.folder)
    return facts


def _checking(written: Format, model: Live, output: Path, dtype: str, facts: dict[str, Any]) -> Callable[[Path], None]:
    """What opens a written file or folder in its engine, and adds to the facts what came of it."""
    engine = engine_for(written)
    return _opening(engine, lambda path: engine.parity(path, model.reference(dtype)), output, facts)


def _opening(
    engine: Engine, parity_of: Callable[[Path], Parity], output: Path, facts: dict[str, Any]
) -> Callable[[Path], None]:
    """What refuses a written file or folder that an engine, where it is here, finds to compute something else."""
    facts |= {"difference": None, "same_tokens": None}

    def check(path: Path) -> None:
        if (missing := engine.missing()) is not None:
            facts["checked"] = f"not opened: {missing}"
            return
        parity = parity_of(path)
        if parity.opens != "yes":
            raise ExportError(
                f"{output} would read back differently in {engine.program}: {parity.reason}. It was not written."
            )
        facts.update(
            checked=f"opened in {engine.program}", difference=parity.difference, same_tokens=parity.same_tokens
        )

    return check
