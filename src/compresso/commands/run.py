"""`compresso run`: the job, and what the terminal says of its result."""

import json
import os

from compresso.commands import verify
from compresso.engines.parity import Parity
from compresso.report.facts import metric_line
from compresso.report.records import RunRecords
from compresso.runner.run import Result, run

__all__ = ["run", "show"]


def show(result: Result, as_json: bool) -> None:
    """Print a result's records as JSON, or where it lies, what it counts and which engines opened it."""
    if int(os.environ.get("RANK", "0")):
        return  # launched in several processes, of which one speaks
    if as_json:
        print(json.dumps(result.records, indent=2, allow_nan=False))
        return
    before, after = (result.records[when]["parameters"]["total"] for when in ("before", "after"))
    print(
        f"{result.folder}: {before:,} -> {after:,} parameters, layout {result.records['layout']}. Open it with"
        f" compresso.load({str(result.folder)!r})"
    )
    records = RunRecords.checked(result.records, "the run's records")
    if records.engines:
        verify.show([Parity(**engine.model_dump()) for engine in records.engines], as_json=False)
    if metric := metric_line(records):
        print(metric)
    if dense := records.stored_dense():
        print(dense)
