"""`kept_experts.json` beside a checkpoint whose layers lost experts: which of the original model's each layer has, for
loaders that take such a list, and for whoever compares routing before and after.
"""

import json

from compresso.job import Job


def kept_experts(job: Job) -> dict[str, str]:
    """The file by its name; nothing where no expert left.

    Its text is a list with, for each layer of the result, the ascending numbers that its experts had in the original
    layer; a layer without experts has none.
    """
    if not any(name.endswith(".experts") for name in job.plan.kept):
        return {}
    rows: list[list[int]] = []
    for layer, shape in enumerate(job.arch.shapes(job.model)):
        name = job.plan.original_name(f"layers.{layer}.experts")
        rows.append(list(job.plan.kept.get(name, range(shape.experts))) if shape.experts else [])
    return {"kept_experts.json": "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]\n"}
