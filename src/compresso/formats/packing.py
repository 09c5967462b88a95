"""What a run rounded, told from its records: what can be packed, and how."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compresso.checkpoint.folder import read_json
from compresso.edit.round_inputs import Range, range_of
from compresso.errors import ExportError

_MOST = 8
ROUNDING = "awq, gptq, qat, rtn, smoothquant, besa with bits, sparsegpt with bits"
"""The stages that round, with what some of them want for it."""


@dataclass(frozen=True)
class Packing:
    """What a run rounded.

    Args:
        linears: full names.
        bits, group, symmetric: of their grids; group 0 is one scale a row.
        inputs: what shares a scale of the activations that they round, None if they round none.
        simulated: bits of activations that were rounded, and that the format does not have; None if there are none.
    """

    linears: tuple[str, ...]
    bits: int
    group: int = 0
    symmetric: bool = True
    inputs: Range | None = None
    simulated: int | None = None

    @property
    def kind(self) -> str:
        """In words, such as "4 bits, groups of 128, asymmetric"."""
        shared = f"groups of {self.group}" if self.group else "a scale a row"
        return (
            f"{self.bits} bits, {shared}"
            + ("" if self.symmetric else ", asymmetric")
            + (", activations of 8 bits" if self.inputs else "")
        )

    @property
    def format(self) -> str:
        """What the library calls it."""
        return "int-quantized" if self.inputs else "pack-quantized"


def packing_of(folder: Path | None) -> Packing:
    """What can be packed of a folder that compresso wrote, by its records: what the last stage that rounded left.

    Raises ExportError, with the cure, if nothing can.
    """
    path = None if folder is None else folder / "records.json"
    records: dict[str, Any] = read_json(path) if path is not None and path.is_file() else {}
    stages: list[dict[str, Any]] = records.get("recipe", {}).get("stages", [])
    rounding = [
        (name, knobs) for one in stages for name, knobs in one.items() if knobs.get("bits") or name in _OWN_WORDS
    ]
    if not rounding:
        raise ExportError(
            f"nothing in it was rounded by compresso, so there is nothing to pack; run one of {ROUNDING} on it first"
        )
    name, knobs = rounding[-1]
    linears = tuple(weight.removesuffix(".weight") for weight in records["stages"][name]["zeros"])
    if name in _OWN_WORDS:
        return _OWN_WORDS[name](linears, knobs, records["stages"][name])
    group = records["stages"][name].get("group", knobs.get("group"))  # what fitted, where that was another
    return Packing(linears, int(knobs["bits"]), int(group or 0), bool(knobs.get("symmetric")))


def _smoothquant(linears: tuple[str, ...], knobs: dict[str, Any], facts: dict[str, Any]) -> Packing:
    return Packing(linears, 8, inputs=range_of(knobs["inputs"]))


def _qat(linears: tuple[str, ...], knobs: dict[str, Any], facts: dict[str, Any]) -> Packing:
    """Binary and ternary rows take 2 bits; activations go with the weights if a grid of the format is theirs. Raises
    ExportError if weights were not rounded.
    """
    bits = int(knobs["weight_bits"])
    if bits > _MOST:
        raise ExportError(f"qat rounded no weights (weight_bits={bits}), so there is nothing to pack; give it 1 to 8")
    as_integers = bits == knobs["input_bits"] == 8 and knobs["inputs"] == "token" and not facts["asymmetric_inputs"]
    rounded = None if knobs["input_bits"] > _MOST else int(knobs["input_bits"])
    symmetric, inputs = bool(knobs["weight_symmetric"]), range_of("token") if as_integers else None
    return Packing(linears, max(bits, 2), 0, symmetric, inputs, None if as_integers else rounded)


_OWN_WORDS = {"smoothquant": _smoothquant, "qat": _qat}
"""Stages whose knobs say otherwise than by `bits` and `group` what they rounded."""
