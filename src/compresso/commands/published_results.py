"""What was measured of each method, kept beside the package for its catalogue: our own numbers, written by
`benchmarks/structured_report.py`, `benchmarks/trust.py` and `benchmarks/refusals.py`,
and what papers found of trust, each row with its source.
"""

import json
from importlib.resources import files
from typing import Any


def measured(stage: str) -> list[dict[str, Any]]:
    """The rows of one stage: {"method", "model", "what", "dense", "kept": {share of blocks: "mean ± sd (before
    recovery)"}, "how"}.

    Empty for a stage that the comparison does not hold.
    """
    found = _read("measured.json")
    return [{**row, "how": found["how"]} for row in found["rows"] if row["stage"] == stage]


def trust_costs(stage: str) -> list[dict[str, Any]]:
    """What a stage was found to cost in trust: {"what", "on", "found", "by", "how"}, papers first.

    `by` is the paper, or "compresso" for our own. Empty for a stage of which nobody measured it.
    """
    told: list[dict[str, Any]] = []
    for name in ("published_trust.json", "measured_trust.json", "measured_refusals.json"):
        found = _read(name)
        for row in found["rows"]:
            if stage in row["stages"]:
                told.append({**{key: row[key] for key in ("what", "on", "found", "by")}, "how": found["how"]})
    return told


def _read(name: str) -> dict[str, Any]:
    return json.loads((files("compresso.commands") / name).read_text("utf-8"))
