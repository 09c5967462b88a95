"""A model of pictures as an ONNX graph, in fp32, fp16 or int8, opened in ONNX Runtime and OpenVINO: how often its
classes are the model's, how many pictures a second, and how much memory in a process that has a small board's.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compresso.checkpoint.source import Source
from compresso.engines.encoder import encoder_reference
from compresso.engines.onnx_runtime import ONNX
from compresso.engines.parity import Format
from compresso.engines.pictures import AGREEING, RUNTIMES, looked_at
from compresso.engines.written import load_for
from compresso.errors import ExportError
from compresso.formats.onnx_encoder import save_onnx_encoder
from compresso.runner.pictures import pictures_of

log = logging.getLogger(__name__)

CALIBRATED, COMPARED = 32, 32
"""Pictures of the data, at most: those that scale activations, and others on which classes are compared."""


def export_pictures(source: Source, output: Path, dtype: str, force: bool, data: str | Path | None) -> dict[str, Any]:
    """Write a graph and look at it in each engine that is here; returns what `export` returns, without arch and bytes.

    data: pictures of the model's task; None for noise, on which no classes are compared and nothing is calibrated.

    Raises DataError, CheckpointError, ExportError.
    """
    shown = None if data is None else pictures_of(source, data, CALIBRATED + COMPARED)
    scaled = None if shown is None or dtype != "int8" else shown[::2][:CALIBRATED]
    compared = None if shown is None else shown[1::2][:COMPARED]
    live = load_for(Format.ONNX, source)
    facts: dict[str, Any] = {"output": str(output), "format": str(Format.ONNX), "dtype": dtype}
    facts |= {"difference": None, "same_tokens": None, "calibrated_on": 0 if scaled is None else len(scaled)}
    facts |= {"compared_on": 0 if compared is None else len(compared)}
    reference = encoder_reference(live.model, None, dtype, compared)

    def check(path: Path) -> None:
        found = {one.program: looked_at(one, path, reference, agreed=compared is not None) for one in RUNTIMES}
        if found[ONNX.program]["opens"] == "no":
            raise ExportError(
                f"{output} would read back differently in {ONNX.program}: {found[ONNX.program]['reason']}. It was not"
                " written."
            )
        opened = [program for program, one in found.items() if one["opens"] == "yes"]
        missing = [one["reason"] for one in found.values() if one["opens"] != "yes"]
        facts["checked"] = f"opened in {' and '.join(opened)}" if opened else f"not opened: {'; '.join(missing)}"
        facts["difference"] = found[ONNX.program]["difference"]
        facts["engines"] = found
        _warn(found, dtype)

    save_onnx_encoder(live.model, output, dtype=dtype, force=force, check=check, source=live.folder, pictures=scaled)
    return facts


def said(facts: Mapping[str, Any]) -> list[str]:
    """A line for each engine that was here."""
    lines: list[str] = []
    for program, one in facts["engines"].items():
        if one["opens"] != "yes":
            lines.append(f"{program}: {one['opens']}; {one['reason']}")
            continue
        parts = [f"logits within {one['difference']:.2g}"]
        if one["agreement"] is not None:
            parts.append(
                f"the model's class at {100 * one['agreement']:.2f} % of places, {facts['compared_on']} pictures"
            )
        if "not_run" in one:
            parts.append(f"not timed: {one['not_run']}")
        else:
            parts.append(
                f"{one['frames_per_s']:.1f} frames/s ({one['frames_low']:.1f} to {one['frames_high']:.1f};"
                f" {one['processor_ms']:.1f} ms of processor time a frame), {one['peak_bytes'] / 1e6:.0f} MB at most"
                f" under a limit of {one['limit_bytes'] / 1e9:.3g} GB"
            )
        lines.append(f"{program}: {', '.join(parts)}")
    return lines


def _warn(found: Mapping[str, Mapping[str, Any]], dtype: str) -> None:
    """Warn of a graph that names other classes, or does not run in the memory."""
    for program, one in found.items():
        if one["opens"] == "no":
            log.warning("%s does not read the graph as it is: %s", program, one["reason"])
        if one.get("agreement") is not None and one["agreement"] < AGREEING:
            cure = "f16 keeps more" if dtype == "int8" else "look at the model's logits, which may be nearly equal"
            log.warning(
                "in %s the likeliest class is the model's at %.2f %% of places, less than %.0f %%: %s",
                program,
                100 * one["agreement"],
                100 * AGREEING,
                cure,
            )
        if "not_run" in one:
            log.warning("in %s the graph was not run: it %s", program, one["not_run"])
