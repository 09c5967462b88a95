"""What a run's records say in words: what was asked for, how to load the result, and what repeats it."""

import shlex
from collections.abc import Mapping

import yaml

from compresso.core.axis import Kind
from compresso.core.counted import counted, survivors
from compresso.metrics.record import Environment
from compresso.report.read import Run
from compresso.report.records import DataUsed, Engine, RunRecords
from compresso.tasks.base import DEFAULT, task_named
from compresso.wording import SHARES

Rows = list[tuple[str, str]]
_OF = {"blocks": "the block parameters", "total": "all parameters", "macs": "the multiply-accumulates a token"}
KINDS: dict[str, str] = {
    Kind.HEAD: "heads",
    Kind.QUERY: "query heads",
    Kind.HEAD_CHANNEL: "channels of heads",
    Kind.CHANNEL: "FFN units",
    Kind.EXPERT: "experts",
    Kind.EXPERT_CHANNEL: "channels of experts",
    Kind.HIDDEN: "hidden dimensions",
    Kind.LAYER: "layers",
    Kind.ATTENTION: "attention sub-layers",
    Kind.MLP: "FFN sub-layers",
    Kind.VOCAB: "tokens",
}


def asked(run: Run) -> Rows:
    """The job: recipe, budget, data, and what came of the budget."""
    records = run.records
    recipe, data = records.recipe, records.data
    paper = f" (arXiv {recipe.paper})" if recipe.paper else ""
    rows = [
        ("Recipe", f"{recipe.name}{paper}" + (f": {recipe.title}" if recipe.title else "")),
        ("Model", records.model.name),
    ]
    if recipe.task != DEFAULT:
        rows.append(("Task", recipe.task))
    if records.dense is not None:
        rows.append(("Compared with", records.dense.name))
    for stage, knobs in recipe.knobs().items():
        if isinstance(keep := knobs.get("keep"), int | float):
            of = str(knobs.get("of", "blocks"))
            kinds = [KINDS.get(kind, str(kind)) for kind in knobs.get("kinds") or ()]
            removable = f"; what may leave: {', '.join(kinds)}" if kinds else ""
            rounds = f" in {knobs['rounds']} rounds" if knobs.get("rounds") else ""
            if isinstance(targets := knobs.get("family"), dict):
                rounds = f" at the last of its targets {', '.join(map(str, targets))}"
            what = SHARES.get(stage) or _OF.get(of, of).replace("a token", f"a {records.after.macs_of}")
            rows.append(("Budget", f"{stage} keeps {100 * keep:g} % of {what}{rounds}{removable}"))
    before, after = records.before.parameters, records.after.parameters
    shares = [
        f"{after[part] / before[part]:.1%} of {words}"
        for part, words in list(_OF.items())[:2]
        if before.get(part) and part in after
    ]
    rows.append(("Kept", ", ".join(shares).replace("%", " %")))
    if data is None:
        rows.append(("Data", "none: the recipe needs none"))
    else:
        rows.append(("Data", f"{data.source} ({', '.join([data.kind, *amounts(data)])})"))
        if data.columns:
            rows.append(("Columns read", ", ".join(data.columns)))
        rows += [("Of the data", note) for note in data.notes]
    prompt = (
        f"collaborative prompt, version {records.prompt.get('version', '?')}"
        if records.prompt
        else "no prompt before the examples"
    )
    rows.append(("Prompt", prompt))
    for name, stage in records.stages.items():
        if (held := stage.held) is not None:
            best = min(held.loss)
            rows.append(
                (
                    "Held-out loss",
                    f"{name}: {held.loss[0]:.4f} before training, {best:.4f} after {counted(held.best, 'update')},"
                    f" whose state was kept; {held.why}",
                )
            )
    rows.append(("Time", _times(records)))
    rows.append(("Layout", f"{records.layout}" + (f", {records.dtype}" if records.dtype else "")))
    return rows


def amounts(data: DataUsed) -> list[str]:
    """How many examples were used, of those that were looked at, and their tokens; what older records do not say is
    left out.
    """
    counts = data.examples
    told: list[str] = []
    if "n" in counts:
        kept = survivors(counts)
        told.append(
            f"{kept:,} of {counted(counts['n'], 'example')}" if kept < counts["n"] else counted(kept, "example")
        )
    return told + ([counted(counts["tokens"], "token")] if "tokens" in counts else [])


def repeat(run: Run) -> Rows:
    """Everything beside the recipe that decides the result."""
    records = run.records
    rows = [("Model", f"{records.model.name}, {records.model.fingerprint}"), ("Seed", str(records.seed))]
    rows.append(("Data", f"{records.data.source}, sha256 {records.data.sha256}" if records.data else "none"))
    rows.append(("Versions", pairs(records.versions)))
    rows.append(("Machine", pairs({key: value for key, value in records.machine.items() if value is not None})))
    rows.append(("Result", run.result))
    return rows


def command(run: Run) -> str:
    """The shell command that repeats a run from its own recipe.yaml, which holds every knob."""
    records = run.records
    words = ["compresso", "run", "recipe.yaml", "--model", records.model.name]
    if records.data is not None:  # as it was named; the records' own words tell what it turned out to be
        words += ["--data", str(records.recipe.data.get("source"))]
    if (
        records.layout != "uniform"
    ):  # uniform comes by itself where the shapes allow it; asked for, it would constrain them
        words += ["--layout", records.layout]
    return shlex.join([*words, "--seed", str(records.seed), "--output", f"{run.name.rpartition('/')[2]}-again"])


def recipe_yaml(run: Run) -> str:
    """The recipe as it was run."""
    return yaml.safe_dump(run.records.recipe.model_dump(mode="json"), sort_keys=False, width=100, allow_unicode=True)


def loading(run: Run, commands: Mapping[str, str]) -> list[tuple[str, str]]:
    """How to open the result: (what with, Python code or shell commands).

    Args:
        run: the result.
        commands: of engines that read other formats, by their names in the records, with {folder} and {code} in them.
    """
    folder = repr(run.name.rpartition("/")[2])
    task = task_named(run.records.recipe.task)
    plain = f"from transformers import {task.auto_class}\n\nmodel = {task.auto_class}.from_pretrained({folder})"
    opener = "compresso" if task.writes_text else "transformers, text in"
    ways = [(opener, task.usage.replace("{folder}", folder))]
    if file := run.records.class_file():
        ways.append(("transformers, with compresso installed", f"import compresso  # knows this model type\n{plain}"))
        remote = plain.replace(f"({folder})", f"({folder}, trust_remote_code=True)")
        ways.append((f"transformers alone: runs {file}, which lies beside the weights", remote))
    else:
        ways.append(("transformers", plain))
    opened = {engine.engine for engine in run.records.engines if engine.opens == "yes"}
    name = run.name.rpartition("/")[2]
    code = own_code(run.records)
    return ways + [(engine, filled(text, name, code)) for engine, text in commands.items() if engine in opened]


def own_code(records: RunRecords) -> str:
    """The option that lets the code beside the weights run, if there is some."""
    return " --trust-remote-code" if records.class_file() else ""


def filled(command: str, folder: str, code: str) -> str:
    """An engine's commands for a folder; `code` is the option that lets its own code run, or empty."""
    return command.replace("{folder}", folder).replace("{code}", code)


def engine_remark(engine: Engine) -> str:
    """What is to be said of an engine's answer, in a line."""
    parts = [engine.reason] if engine.reason else []
    if engine.difference is not None and (engine.opens == "yes" or not engine.reason):
        parts.append(f"largest difference {engine.difference:.1g}")
    if engine.same_tokens is not None:
        parts.append(f"{engine.same_tokens} greedy tokens the same")
    return ", ".join(parts)


def place(environment: Environment) -> str:
    """Where a number was made, in one line."""
    parts = [environment.device, environment.hardware, counted(environment.threads, "thread"), environment.system]
    return ", ".join([*parts, *([environment.dtype] if environment.dtype else []), pairs(environment.versions)])


def pairs(values: Mapping[str, str | int | None]) -> str:
    """Names and values in one line."""
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _times(records: RunRecords) -> str:
    """What each stage took, and the run; that some of it is not known stands once at the end."""
    every = [(name, stage.seconds, stage.since_resume) for name, stage in records.stages.items()]
    every.append(("in all", records.seconds, records.since_resume))
    told = [f"{name} {written_time(seconds, since)}" for name, seconds, since in every if seconds is not None]
    if any(since for _, _, since in every):
        told.append("the time before the resume is not known")
    return "; ".join(told)


def written_time(seconds: float, since_resume: bool = False) -> str:
    """A duration for people; `since_resume` where it lacks what came before a resume.

    >>> written_time(129.05), written_time(9000)
    ('2.2 min', '2.5 h')
    >>> written_time(12.0, since_resume=True)
    '12 s since the resume'
    """
    told = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
    told = told if seconds < 6000 else f"{seconds / 3600:.1f} h"
    return f"{told} since the resume" if since_resume else told


def guard(run: Run) -> list[str]:
    """What the collapse guard said: its message, and what its checks add to that."""
    message = run.records.guard.message()
    added = [one.words for one in run.records.guard.checks if one.words not in message]
    return [message, *dict.fromkeys(added)]
