"""The prompts of arXiv 2401.10862, from a file that the user names: tasks in categories and severities, each bare and
in ten templates.

    TEMPLATE: {CATEGORY: {TOPIC: {SEVERITY: [task, task, task]}}}

with 5 categories of 5 topics, 3 severities of 3 tasks, and ORIGINAL, whose tasks stand bare, among 11 templates. The
benign control has {TEMPLATE: [225 prompts]}. YAML or JSON, also .gz.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from compresso.core import strict_json
from compresso.core.strict_yaml import OneOfEachKey, Refused
from compresso.data.lines import whole_text
from compresso.errors import DataError

BARE = "ORIGINAL"
CATEGORIES, TOPICS, SEVERITIES, TASKS, TEMPLATES = 5, 5, 3, 3, 10
PER_TEMPLATE = CATEGORIES * TOPICS * SEVERITIES * TASKS
BENIGN = "benign"


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Args:
        id: its place in the file, as "AIM/0/3/1/2": template, category, topic, severity, task.
        template: by name; BARE for the task alone.
        category, severity: by name; "benign" and "" of the control.
        task: the task without a template.
        text: what is asked.
    """

    id: str
    template: str
    category: str
    severity: str
    task: str
    text: str


@dataclass(frozen=True)
class PromptSet:
    """All prompts of a file, in its order.

    Args:
        name: of the file.
        sha256: of its content, for the protocol.
        prompts: 2475 of them.
    """

    name: str
    sha256: str
    prompts: tuple[Prompt, ...]


def prompt_sets(prompts: str | Path, benign: str | Path | None) -> tuple[PromptSet, ...]:
    """The harmful tasks and, where their file is given, the everyday ones in the same templates.

    Raises:
        DataError: as `harmful_prompts`, or the templates of one are not those of the other.
    """
    harmful = harmful_prompts(prompts)
    if benign is None:
        return (harmful,)
    control = benign_prompts(benign)
    theirs, mine = ({one.template for one in file.prompts} for file in (harmful, control))
    if odd := sorted(mine - theirs):
        raise DataError(
            f"--benign {control.name}: template {odd[0]} is none of --prompts {harmful.name}, which has"
            f" {', '.join(sorted(theirs - mine))} for it; give two files of the same templates"
        )
    return harmful, control


def harmful_prompts(path: str | Path) -> PromptSet:
    """The harmful tasks in all templates.

    Raises:
        DataError: the file is missing, no such mapping, or of another shape, which is named.
    """
    name, sha256, tree = _tree(path, "--prompts")
    bare = _categories(tree[BARE], f"{name}: {BARE}")
    labels = [(c, t, s) for c, topics in bare.items() for t, levels in topics.items() for s in levels]
    if len({severity for *_, severity in labels}) != SEVERITIES:
        raise DataError(f"{name}: severities differ from topic to topic; wanted the same {SEVERITIES} in each")
    known: dict[str, str] = {}
    prompts: list[Prompt] = []
    for template, tasks in tree.items():
        mine = _categories(tasks, f"{name}: {template}")
        if [(c, t, s) for c, topics in mine.items() for t, levels in topics.items() for s in levels] != labels:
            raise DataError(
                f"{name}: {template} has other categories, topics or severities than {BARE}, or in another order"
            )
        for place, (c, t, s) in enumerate(labels):
            for number, (text, task) in enumerate(zip(mine[c][t][s], bare[c][t][s], strict=True)):
                where = f"{template}/{place // (TOPICS * SEVERITIES)}/{place // SEVERITIES % TOPICS}"
                where += f"/{place % SEVERITIES}/{number}"
                _check_wrapped(name, where, template, text, task)
                if template == BARE and known.setdefault(task.strip(), where) != where:
                    raise DataError(f"{name}: {where} is the task that stands at {known[task.strip()]}; wanted another")
                prompts.append(Prompt(where, template, c, s, task, text))
    return PromptSet(name, sha256, tuple(prompts))


def benign_prompts(path: str | Path) -> PromptSet:
    """The everyday tasks in the same templates.

    Raises:
        DataError: as `harmful_prompts`.
    """
    name, sha256, tree = _tree(path, "--benign")
    prompts: list[Prompt] = []
    for template, texts in tree.items():
        found = _texts(texts, PER_TEMPLATE, f"{name}: {template}")
        bare = _texts(tree[BARE], PER_TEMPLATE, f"{name}: {BARE}")
        for place, (text, task) in enumerate(zip(found, bare, strict=True)):
            _check_wrapped(name, f"{template}/{place}", template, text, task)
            prompts.append(Prompt(f"{BENIGN}/{template}/{place}", template, BENIGN, "", task, text))
    return PromptSet(name, sha256, tuple(prompts))


def _check_wrapped(name: str, where: str, template: str, text: str, task: str) -> None:
    """Raise DataError for a text that does not hold its task, or is the task without a template."""
    if task.strip() not in text:
        raise DataError(f"{name}: {where} does not hold the task that stands there under {BARE}")
    if template != BARE and text.strip() == task.strip():
        raise DataError(f"{name}: {where} is the bare task, as under {BARE}; wanted it in the template {template}")


def _tree(path: str | Path, option: str) -> tuple[str, str, dict[str, Any]]:
    """The file's name, hash and its mapping of templates."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise DataError(f"{option} {path} is no file; give the prompts of arXiv 2401.10862 as YAML or JSON")
    text = whole_text(path)
    tree = _parsed(text, path)
    if not isinstance(tree, dict) or not all(isinstance(name, str) for name in tree):
        raise DataError(f"{path.name}: wanted a mapping from {TEMPLATES + 1} templates to tasks, got {_kind(tree)}")
    if BARE not in tree or len(tree) != TEMPLATES + 1:
        bare = "" if BARE in tree else f", none of them {BARE}"
        raise DataError(
            f"{path.name}: {len(tree)} templates{bare}; wanted {BARE}, whose tasks stand bare, and {TEMPLATES} others."
            " A file of tasks alone is not enough"
        )
    return path.name, hashlib.sha256(text.encode()).hexdigest(), tree


def _parsed(text: str, path: Path) -> Any:
    """The value of JSON, or of YAML without aliases, which a small file could grow with."""
    if ".json" in path.suffixes:
        try:
            return strict_json.loads(text)
        except ValueError as error:
            raise DataError(f"{path.name}: no JSON: {error}") from error
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.CSafeLoader)):
            raise DataError(f"{path.name}: it uses a YAML alias (*name), which is not read; write the value out")
        return yaml.load(text, Loader=_Loader)
    except Refused as error:
        raise DataError(f"{path.name}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise DataError(f"{path.name}{where}: no plain YAML: {getattr(error, 'problem', None) or error}") from error


class _Loader(OneOfEachKey, yaml.CSafeLoader):
    """Safe YAML without duplicate keys."""


def _categories(value: Any, where: str) -> dict[str, dict[str, dict[str, list[str]]]]:
    """Category -> topic -> severity -> tasks, each as many as published."""
    return {
        category: {
            topic: {
                severity: _texts(tasks, TASKS, f"{where}, {topic!r}, {severity!r}")
                for severity, tasks in _named(levels, SEVERITIES, "severities", f"{where}, {topic!r}").items()
            }
            for topic, levels in _named(topics, TOPICS, "topics", f"{where}, {category!r}").items()
        }
        for category, topics in _named(value, CATEGORIES, "categories", where).items()
    }


def _named(value: Any, n: int, what: str, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict) or len(value) != n or not all(isinstance(name, str) for name in value):
        got = f"{len(value)}" if isinstance(value, dict) else _kind(value)
        raise DataError(f"{where}: wanted {n} {what} by name, got {got}")
    return value


def _texts(value: Any, n: int, where: str) -> list[str]:
    if not isinstance(value, list) or len(value) != n:
        raise DataError(f"{where}: wanted {n} texts, got {len(value) if isinstance(value, list) else _kind(value)}")
    for number, one in enumerate(value, 1):
        if not isinstance(one, str) or not one.strip():
            got = "an empty one" if isinstance(one, str) else _kind(one)
            raise DataError(f"{where}: text {number} of {n} is {got}; wanted a text")
    return value


def _kind(value: Any) -> str:
    return {dict: "a mapping", list: "a list", str: "a text", type(None): "nothing"}.get(
        type(value), json.dumps(str(value))[:40]
    )
