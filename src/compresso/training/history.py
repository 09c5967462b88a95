"""What a run logged: one row of numbers an update, kept as columns where it is written to disk.

Phases log different numbers, so a column holds the updates at which it was logged beside the values. Values are
float64, exactly those that were logged. Skipped updates (a loss or gradient that was not finite) have no row; their
indices are listed apart.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class History:
    """The log of a run.

    Args:
        rows: one mapping an update that was performed; "update" is its index, "loss" and the objective's other numbers
            are means over the global batch.
        skipped: indices of the updates that were skipped because their loss or gradient was not finite.
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)

    def column(self, name: str) -> list[float]:
        """All values logged under a name, in order."""
        return [row[name] for row in self.rows if name in row]

    def to_tensors(self) -> dict[str, Tensor]:
        """The rows as columns: `name/at` int64 [n], `name/value` float64 [n]."""
        at: dict[str, list[int]] = {}
        value: dict[str, list[float]] = {}
        for row in self.rows:
            for name, number in row.items():
                if name != "update":
                    at.setdefault(name, []).append(int(row["update"]))
                    value.setdefault(name, []).append(number)
        columns = {f"{name}/at": torch.tensor(updates, dtype=torch.int64) for name, updates in at.items()}
        return columns | {
            f"{name}/value": torch.tensor(numbers, dtype=torch.float64) for name, numbers in value.items()
        }

    @classmethod
    def from_tensors(cls, columns: Mapping[str, Tensor], skipped: list[int]) -> "History":
        """The inverse of `to_tensors`."""
        rows: dict[int, dict[str, float]] = {}
        for key, updates in columns.items():
            if key.endswith("/at"):
                name = key.removesuffix("/at")
                for update, number in zip(updates.tolist(), columns[f"{name}/value"].tolist(), strict=True):
                    rows.setdefault(update, {"update": update})[name] = number
        return cls([rows[update] for update in sorted(rows)], list(skipped))


def curve(history: History, points: int = 200) -> dict[str, list[float | None]]:
    """A training log thinned to at most `points` rows a column, for records and plots; "update" is the horizontal axis.

    None where a phase did not log a column.
    """
    step = max(1, -(-len(history.rows) // points))
    rows = history.rows[::step]
    names = sorted({name for row in history.rows for name in row})
    return {name: [round(float(row[name]), 6) if name in row else None for row in rows] for name in names}
