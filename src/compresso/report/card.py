"""The README.md of a checkpoint: what it is, where it comes from, what became smaller, what was measured and what was
not.

The front matter follows the hub's model card. Of its relations to a base model (adapter, merge, quantized, finetune) a
pruned model is a finetune: its weights were changed and tuned, and it replaces the base model; there is no term for
pruned, so the tags say it. A base model is named only if it has an owner on the hub, and a licence never, because
nobody told us either.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from compresso.checkpoint.hub import is_hub_name
from compresso.core.plan import Plan
from compresso.metrics.record import Measurement, ModelResults
from compresso.report import facts
from compresso.report.advice import advice
from compresso.report.columns import group
from compresso.report.done import deeds, forgets, participle
from compresso.report.read import Comparison, comparison_of_run
from compresso.report.records import RunRecords
from compresso.report.stage_table import stage_table
from compresso.report.table import Cell, missing, tables
from compresso.report.templating import environment
from compresso.report.trust_rows import TITLES, trust_rows
from compresso.tasks.base import task_named

_DATASETS = {
    "wikitext2": {"name": "WikiText-2", "type": "Salesforce/wikitext", "config": "wikitext-2-raw-v1"},
    "c4": {"name": "C4", "type": "allenai/c4", "config": "en"},
}
"""Corpora whose hub name is not their own; others are named as they were given."""
_METRICS = {"acc": "accuracy"}
_LIMITS = {
    True: "Pruning keeps what its calibration data asked for.",
    False: "What became of it on other texts than those above is not known.",
}
_NEVER = ("bias, toxicity and safety", "languages and topics beyond those of the data above")


def model_card(records: RunRecords, commands: Mapping[str, str] | None = None, readers: str = "") -> str:
    """Markdown from what a run's records.json holds.

    Args:
        records: of the run.
        commands: what to show for engines that opened it, as in `facts.loading`; None for nothing.
        readers: a sentence on the versions of transformers that open it; empty for nothing.
    """
    comparison = comparison_of_run(records, Plan())
    pruned = comparison.models[-1]  # the dense model stands first; a run that kept everything has no other
    opened = [one.engine for one in records.engines if one.opens == "yes"]
    code = facts.own_code(records)
    numbers = [number for number in pruned.measurements if number.how != "counted"]
    template = environment(escaped=False).get_template("card.md.jinja")
    return template.render(
        front=yaml.safe_dump(_front_matter(records, pruned), sort_keys=False, allow_unicode=True, width=120),
        title=_plain(records.model.name),
        model=_one_line(records.model.name),
        recipe=_one_line(records.recipe.name),
        layout=records.layout,
        class_file=records.class_file(),
        auto_class=task_named(records.recipe.task).auto_class,
        reads_text=task_named(records.recipe.task).reads_text,
        fine_tuned=_one_line(records.dense.name) if records.dense else "",
        participle=participle(records),
        limits=_LIMITS["pruned" in participle(records)],
        unserved=_plain(forgets(records)),
        deeds=[_plain(deed) for deed in deeds(records)],
        smaller=records.after.parameters != records.before.parameters or not records.stored_dense(),
        dense=_plain(records.stored_dense()),
        prompt=records.prompt.get("version") if records.prompt else None,
        guard=_plain(records.guard.message()) if records.guard.verdict != "ok" else "",
        data=[_plain(line) for line in _data(records)],
        counted=_counted(records),
        stages=_stages(records),
        results=_results(comparison),
        trust=[[_plain(cell) for cell in row] for row in (TITLES, *trust_rows(pruned.changes))],
        advice=[_plain(line) for line in advice(records, pruned)],
        places=list(dict.fromkeys(_plain(facts.place(number.environment)) for number in numbers)),
        engines=[(_plain(one.engine), one.opens, _plain(facts.engine_remark(one))) for one in records.engines],
        elsewhere=[
            (_plain(name), facts.filled(commands[name], "path/to/this/folder", code))
            for name in opened
            if commands and name in commands
        ],
        readers=readers,
        missing=[*map(_plain, missing(comparison)), *(_NEVER[bool(pruned.changes) :])],
    )


def _front_matter(records: RunRecords, pruned: ModelResults) -> dict[str, Any]:
    """The YAML head."""
    source = records.model.name
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": task_named(records.recipe.task).pipeline,
        "tags": ["compresso", *participle(records).split(" and ")],
    }
    if "/" in source and is_hub_name(source):
        front |= {"base_model": source, "base_model_relation": "finetune"}
    if records.class_file():
        front["tags"].append("custom_code")
    results = _index(pruned.measurements, task_named(records.recipe.task).pipeline)
    if results:
        front["model-index"] = [
            {"name": f"{source.rpartition('/')[2]} {participle(records)} by {records.recipe.name}", "results": results}
        ]
    return front


def _index(numbers: Iterable[Measurement], pipeline: str) -> list[dict[str, Any]]:
    """Measured perplexities and accuracies as the hub's model index: one entry for each task and split."""
    entries: dict[tuple[str, str], dict[str, Any]] = {}
    for number in numbers:
        table = group(number.name)
        if number.how != "measured" or not (table == "Perplexity" or table.startswith("Tasks")):
            continue
        name, _, metric = number.name.rpartition("/")
        split = number.protocol.get("split")
        dataset: dict[str, Any] = dict(_DATASETS.get(name, {"name": name, "type": name}))
        if isinstance(split, str):
            dataset["split"] = split
        entry = entries.setdefault(
            (name, str(split)),
            {
                "task": {"type": pipeline, "name": pipeline.replace("-", " ").capitalize()},
                "dataset": dataset,
                "metrics": [],
            },
        )
        extra = {
            key: value
            for key, value in (("stderr", number.stderr), ("n", number.n), ("seed", number.seed))
            if value is not None
        }
        kind = _METRICS.get(metric, metric)
        entry["metrics"].append(
            {"type": kind, "value": number.value, "name": metric, "args": {**number.protocol, **extra}}
        )
    return list(entries.values())


def _data(records: RunRecords) -> list[str]:
    """What the run read, and what of it gave no example, a line each; nothing where it read none."""
    if records.data is None:
        return []
    used = f"{records.data.source} ({', '.join([records.data.kind, *facts.amounts(records.data)])})"
    columns = [f"columns read: {', '.join(records.data.columns)}"] if records.data.columns else []
    return [used, *columns, *records.data.notes]


def _counted(records: RunRecords) -> list[tuple[str, int, int]]:
    """Rows of before and after."""
    before, after = records.before, records.after
    rows = [
        (_plain(f"parameters, {name}"), before.parameters.get(name), count) for name, count in after.parameters.items()
    ]
    rows += [(f"MACs a {after.macs_of}", before.macs_per_token, after.macs_per_token)]
    rows += [("KV cache, bytes a token", before.kv_bytes_per_token, after.kv_bytes_per_token)]
    if before.active_parameters_per_token is not None and after.active_parameters_per_token is not None:
        rows += [
            ("parameters that a token meets", before.active_parameters_per_token, after.active_parameters_per_token)
        ]
    return [(name, old, new) for name, old, new in rows if old]


def _stages(records: RunRecords) -> list[list[str]]:
    """What each stage cost and left, titles first; nothing where there is one alone."""
    found = stage_table(records)
    return [] if found is None else [[_plain(cell) for cell in row] for row in (found.titles, *found.rows)]


def _results(comparison: Comparison) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """What was measured and what was estimated, apart: (kind, rows of name, dense, this model)."""
    rows: dict[str, list[tuple[str, str, str]]] = {}
    for table in tables(comparison):
        dense = next(row for row in table.rows if row.kind == "dense")
        mine = next(
            (row for row in table.rows if row.kind == "pruned"), dense
        )  # the same weights, if the run kept everything
        for column, old, new in zip(table.columns, dense.cells, mine.cells, strict=True):
            if column.how != "counted" and table.title != "Trust":
                name = f"{table.title}: {column.title}" + (f" ({column.detail})" if column.detail else "")
                rows.setdefault(column.how.capitalize(), []).append((_plain(name), _words(old), _words(new)))
    return list(rows.items())


def _words(cell: Cell) -> str:
    noise = " (within noise)" if cell.within_noise else ""
    return _plain(cell.text + noise + (f"; {cell.remark}" if cell.remark else ""))


def _one_line(text: str) -> str:
    """Text that stays in its line, its table cell and its code span."""
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'").replace("<", "&lt;")


def _plain(text: str) -> str:
    """Text outside of code spans: a name in it becomes no link, no image and no emphasis, whoever chose the name.

    Brackets are escaped; what renderers take for an address without any mark, also after they resolved entities, is
    parted by a space of no width.
    """
    shown = "".join(letter for letter in " ".join(text.split()) if letter.isprintable())
    return _ADDRESS.sub(
        _PARTED, _MARKS.sub(r"\\\g<0>", shown).replace("`", "'").replace("&", "&amp;").replace("<", "&lt;")
    )


_MARKS = re.compile(r"[\\\[\]|*]|^[#>+~=-]")
_ADDRESS = re.compile(r"(?<=:)(?=//)|(?i:(?<=\bwww)(?=\.))|(?<=[\w.+-])(?=@\w)|(?i:(?<=mailto)|(?<=xmpp))(?=:)")
_PARTED = "\u200b"
