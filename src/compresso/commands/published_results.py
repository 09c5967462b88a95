"""What was measured of each method, kept beside the package for its catalogue: written by
`benchmarks/structured_report.py`, read here.
"""

import json
from importlib.resources import files
from typing import Any


def measured(stage: str) -> list[dict[str, Any]]:
    """The rows of one stage: {"method", "model", "what", "dense", "kept": {share of blocks: "mean ± sd (before
    recovery)"}, "how"}.

    Empty for a stage that the comparison does not hold.
    """
    found = json.loads((files("compresso.commands") / "measured.json").read_text("utf-8"))
    return [{**row, "how": found["how"]} for row in found["rows"] if row["stage"] == stage]
