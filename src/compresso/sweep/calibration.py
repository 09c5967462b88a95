"""Calibration data of a sweep: which rows, and how they run together."""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as validated_dataclass
from torch import Tensor

from compresso.core.row import Row
from compresso.errors import DataError
from compresso.sweep.activation_store import Place


@validated_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Calibration:
    """How a sweep is calibrated.

    Args:
        examples: rows at most, drawn without repetition; all of them, in their order, where there are no more.
        batch: rows a forward pass.
        activations: where the states between two blocks are kept: "device", "cpu" or "disk".
        true_sequential: look at a block again after each group of linears, so that those behind see the edited ones
            before them.
    """

    examples: Annotated[int, Ge(1)] = 128
    batch: Annotated[int, Ge(1)] = 8
    activations: Place = "device"
    true_sequential: bool = False

    def batches(self, rows: Sequence[Row], seed: int) -> list[Tensor]:
        """Ids [rows, seq] of batches whose rows are equally long, so that nothing is padded. Raises DataError without
        rows.
        """
        if not rows:
            raise DataError("there is no calibration data: every example is held out; give more, or lower data.held")
        order = list(range(len(rows)))
        if len(rows) > self.examples:
            generator = torch.Generator().manual_seed(seed)
            order = sorted(torch.randperm(len(rows), generator=generator)[: self.examples].tolist())
        by_length: dict[int, list[list[int]]] = {}
        for i in order:
            ids = rows[i]["input_ids"]
            by_length.setdefault(len(ids), []).append(ids)
        return [
            torch.tensor(alike[start : start + self.batch])
            for _, alike in sorted(by_length.items())
            for start in range(0, len(alike), self.batch)
        ]
