"""Run folders and report files in, one comparison out: the same weights are one model wherever they were measured.

A model is known by its fingerprint. Where two inputs hold the same number of the same model, made by the same protocol,
the newer one counts; numbers are never averaged. Which model is dense follows from the runs (the model they started
from), from the name "dense", or from standing first in a report of several models.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from compresso.checkpoint.folder import read_json
from compresso.checkpoint.places import without_places_in
from compresso.core.plan import Plan
from compresso.errors import CheckpointError
from compresso.metrics.record import Change, Measurement, ModelResults, Report, Sample, Segmented
from compresso.report.columns import Key, column_key
from compresso.report.records import RunRecords, first_fault

RECORDS, PLAN = "records.json", "plan.json"


@dataclass(frozen=True)
class Run:
    """A run folder.

    Args:
        name: of its folder, as far as it takes to tell the inputs apart.
        records: checked.
        plan: everything removed, in terms of the model it started from.
        result: fingerprint of the model it wrote.
    """

    name: str
    records: RunRecords
    plan: Plan
    result: str

    @property
    def base(self) -> str:
        """Fingerprint of the model that its result is compared with."""
        return self.records.baseline().fingerprint


@dataclass(frozen=True)
class Input:
    """One file or folder that was given: a label, its report, and the run if it is a run's folder."""

    label: str
    report: Report
    run: Run | None = None


@dataclass(frozen=True)
class Comparison:
    """Models side by side.

    Args:
        models: dense first, each model once, names unique.
        runs: in the order given; each result once.
        dense: fingerprints of the models that nothing was removed from.
        inputs: labels of what was read.
        created: ISO date and time of the newest input.
    """

    models: tuple[ModelResults, ...]
    runs: tuple[Run, ...]
    dense: frozenset[str]
    inputs: tuple[str, ...]
    created: str

    def dense_of(self, results: ModelResults) -> ModelResults | None:
        """The dense model that a model is compared with: the one its run started from, else the only one there is;
        None for itself.
        """
        if results.fingerprint in self.dense:
            return None
        bases = {run.result: run.base for run in self.runs}
        reached, fingerprint = set[str](), results.fingerprint
        while fingerprint in bases and fingerprint not in reached:
            reached.add(fingerprint)
            fingerprint = bases[fingerprint]
        candidates = [one for one in self.models if one.fingerprint in self.dense]
        exact = [one for one in candidates if one.fingerprint == fingerprint]
        return (
            exact[0] if exact else candidates[0] if len(candidates) == 1 and results.fingerprint not in bases else None
        )

    def run_of(self, results: ModelResults) -> Run | None:
        """The run that wrote a model."""
        return next((run for run in self.runs if run.result == results.fingerprint), None)

    def report(self) -> Report:
        """The models as a file that can be compared again."""
        return Report(created=self.created, models=self.models)


def read_results(paths: Sequence[str | Path]) -> Comparison:
    """Read run folders and report files (of `compresso evaluate` and `measure`) and merge them.

    Raises:
        CheckpointError: no input, one that cannot be read, or two that have neither a model nor a measured number in
            common.
    """
    if not paths:
        raise CheckpointError(
            "nothing to compare; give folders that `compresso run` wrote, or files of `compresso evaluate --output`"
        )
    given = [Path(path).expanduser() for path in paths]
    return merged([_read(path, label) for path, label in zip(given, labels(given), strict=True)])


def comparison_of_run(records: RunRecords, plan: Plan) -> Comparison:
    """One run beside the model it started from, before its folder is in its place: called as that will be.

    Raises:
        CheckpointError: its report lacks one of them.
    """
    result = _result_of(records.report, records.baseline().fingerprint, "the run's records")
    name = records.report.models[-1].model
    return merged([Input(name, records.report, Run(name, records, plan, result))])


def merged(inputs: Sequence[Input]) -> Comparison:
    """One comparison of all inputs.

    Raises:
        CheckpointError: two of them have nothing in common.
    """
    _refuse_strangers(inputs)
    runs = tuple({run.result: run for run in reversed([one.run for one in inputs if one.run])}.values())[::-1]
    dense = _dense(inputs, runs)
    fingerprints = dict.fromkeys(results.fingerprint for one in inputs for results in one.report.models)
    names = _names(inputs, dense, runs)
    by_age = sorted(inputs, key=lambda one: _time(one.report.created))
    models: list[ModelResults] = []
    for fingerprint in sorted(fingerprints, key=lambda one: one not in dense):
        numbers: dict[Key, Measurement] = {}
        samples: dict[str, Sample] = {}
        seen: dict[str, Segmented] = {}
        lacking: dict[str, str] = {}
        changes: dict[str, Change] = {}
        model = ""
        of_model = (results for one in by_age for results in one.report.models if results.fingerprint == fingerprint)
        for results in of_model:
            numbers |= {column_key(number): number for number in results.measurements}
            samples |= {sample.prompt: sample for sample in results.samples}
            seen |= {one.picture: one for one in results.segmented}
            lacking |= results.not_measured
            changes |= {one.name: one for one in results.changes}
            model = model or results.model
        models.append(
            ModelResults(
                name=names[fingerprint],
                model=model,
                fingerprint=fingerprint,
                measurements=tuple(numbers.values()),
                samples=tuple(samples.values()),
                segmented=tuple(seen.values()),
                not_measured=lacking,
                changes=tuple(changes.values()),
            )
        )
    return Comparison(tuple(models), runs, dense, tuple(one.label for one in inputs), by_age[-1].report.created)


def labels(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many of its last parts as tell it from the others.

    >>> labels([Path("a/out"), Path("b/out"), Path("c.json")])
    ['a/out', 'b/out', 'c.json']
    """
    parts = [path.absolute().parts for path in paths]
    chosen: list[str] = []
    for mine in parts:
        others = [other for other in parts if other != mine]
        length = next((n for n in range(1, len(mine)) if all(other[-n:] != mine[-n:] for other in others)), len(mine))
        chosen.append("/".join(mine[-length:]))
    return chosen


def _read(path: Path, label: str) -> Input:
    """One input. Raises CheckpointError naming it."""
    if path.is_dir():
        if not (path / RECORDS).is_file():
            raise CheckpointError(
                f"{path} has no {RECORDS}, so `compresso run` did not write it; give the file of `compresso evaluate`"
            )
        return _read_run(path, label)
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist; give a folder that `compresso run` wrote, or a file of `compresso evaluate"
            " --output`"
        )
    if path.suffix in (".gguf", ".safetensors"):
        raise CheckpointError(f"{path} is a model; give the file of `compresso evaluate {path.name} --output FILE`")
    report = _report(path)
    return Input(label, report)


def _report(path: Path) -> Report:
    found = read_json(path)
    if {"recipe", "stages"} <= found.keys():  # what a run writes beside its plan.json
        raise CheckpointError(
            f"{path} holds records of a run; give the folder that `compresso run` wrote, {path.parent}"
        )
    try:
        report = Report.model_validate(without_places_in(found))
    except ValidationError as error:
        raise CheckpointError(
            f"{path} is not a report of measurements: {first_fault(error)}; write it with `compresso evaluate`"
        ) from error
    if not report.models:
        raise CheckpointError(f"{path} holds no measured model; write it with `compresso evaluate`")
    _time(report.created, path)
    return report


def _read_run(folder: Path, label: str) -> Input:
    records = RunRecords.checked(without_places_in(read_json(folder / RECORDS)), str(folder / RECORDS))
    try:
        plan = Plan.from_json((folder / PLAN).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder / PLAN} cannot be read: {error}. Give the whole folder that `compresso run` wrote"
        ) from error
    report = records.report
    _time(report.created, folder / RECORDS)
    return Input(
        label,
        report,
        Run(label, records, plan, _result_of(report, records.baseline().fingerprint, str(folder / RECORDS))),
    )


def _result_of(report: Report, base: str, where: str) -> str:
    """The fingerprint of the model that a run wrote: `base` itself if it kept everything. Raises CheckpointError if
    there is none.
    """
    if len(report.models) < 2:
        raise CheckpointError(f"{where}: the report has no model beside the one the run started from; run it again")
    return next((one.fingerprint for one in report.models if one.fingerprint != base), base)


def _dense(inputs: Sequence[Input], runs: Sequence[Run]) -> frozenset[str]:
    """Fingerprints of the models that nothing was removed from."""
    bases = {run.base for run in runs}
    named = {results.fingerprint for one in inputs for results in one.report.models if results.name == "dense"}
    first = {one.report.models[0].fingerprint for one in inputs if one.run is None and len(one.report.models) > 1}
    smaller = {run.result for run in runs if run.result != run.base}  # a run that kept everything wrote its base again
    return frozenset((bases | named | first) - smaller)


def _names(inputs: Sequence[Input], dense: frozenset[str], runs: Sequence[Run]) -> dict[str, str]:
    """A unique name for each fingerprint: "dense", the run's folder, or what its report calls it."""
    by_run = {run.result: run.name for run in runs}
    names: dict[str, str] = {}
    for one in inputs:
        for results in one.report.models:
            if (fingerprint := results.fingerprint) in names:
                continue
            if fingerprint in dense:
                name = "dense" if len(dense) == 1 else f"dense ({results.model})"
            else:
                name = by_run.get(fingerprint, results.name)
            short = fingerprint.rpartition(":")[2][:8]
            tries = (name, f"{name} ({one.label})", f"{name} ({one.label}, {short})", fingerprint)
            names[fingerprint] = next(
                text for text in tries if text not in names.values() and (text != "dense" or fingerprint in dense)
            )
    return names


def _refuse_strangers(inputs: Sequence[Input]) -> None:
    """Raise CheckpointError unless all inputs hang together by models or by measured numbers of one protocol."""
    groups: list[tuple[str, set[object]]] = []
    for one in inputs:
        mine = _marks(one)
        touching = [group for group in groups if group[1] & mine]
        groups = [group for group in groups if not group[1] & mine]
        groups.append((touching[0][0] if touching else one.label, mine.union(*(marks for _, marks in touching))))
    if len(groups) > 1:
        raise CheckpointError(
            f"{groups[0][0]} and {groups[1][0]} have no model and no measured number of one protocol in common, so"
            " there is nothing to compare; evaluate both in the same way, or compare runs that started from one model"
        )


def _marks(one: Input) -> set[object]:
    """What ties an input to others: its models, and the columns in which it has a measured number."""
    marks: set[object] = {results.fingerprint for results in one.report.models}
    numbers: Iterable[Measurement] = (number for results in one.report.models for number in results.measurements)
    return (
        marks
        | {column_key(number) for number in numbers if number.how == "measured"}
        | ({one.run.base} if one.run else set())
    )


def _time(text: str, where: Path | None = None) -> datetime:
    """A report's date; without a zone it is UTC. Raises CheckpointError if it is none."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise CheckpointError(
            f"{where or 'a report'}: created={text!r} is not an ISO date and time; it was changed"
        ) from error
    return time if time.tzinfo else time.replace(tzinfo=UTC)
