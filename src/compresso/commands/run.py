"""`compresso run`: the job, and what the terminal says of its result."""

import json
import os

from compresso.checkpoint.folder import read_json
from compresso.commands import verify
from compresso.engines.parity import Parity
from compresso.report.records import RunRecords
from compresso.report.stage_table import stage_table
from compresso.report.summary import summary
from compresso.runner.run import Result, run

__all__ = ["run", "show"]


def show(result: Result, as_json: bool) -> None:
    """Print a result's records as JSON (of several targets, those of each by its name), or which engines opened it and
    the five lines of its summary, and what each of several stages cost and left.
    """
    if int(os.environ.get("RANK", "0")):
        return  # launched in several processes, of which one speaks
    if as_json:
        family = {name: read_json(folder / "records.json") for name, folder in result.family.items()}
        print(json.dumps(family or result.records, indent=2, allow_nan=False))
        return
    records = RunRecords.checked(result.records, "the run's records")
    if records.engines:
        verify.show([Parity(**engine.model_dump()) for engine in records.engines], as_json=False)
    for folder in [*result.family.values()][:-1]:
        print(*summary(RunRecords.checked(read_json(folder / "records.json"), str(folder)), folder), "", sep="\n")
    for line in summary(records, result.folder):
        print(line)
    if (stages := stage_table(records)) is not None:
        print("", *stages.lines(), sep="\n")
