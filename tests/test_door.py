"""What public functions refuse at the door, and in whose words."""

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.main import get_command

import compresso
from compresso.cli import app
from compresso.commands.export import FORMATS
from compresso.door import public
from compresso.errors import ArgumentError, BudgetError, CompressoError
from compresso.runner.recipe import DataKnobs
from compresso.runner.round_knobs import ROUNDS, TARGETS
from compresso.stage import cards, knobs_of
from compresso.tasks.base import tasks
from compresso.wording import CHOICES, FLAGS, VALUED, command_line, in_python
from tests.conftest import Call

PACKAGE = Path(compresso.__file__).parent
CHECKED = ("compare", "evaluate", "export", "inspect", "latency", "load", "measure", "plan", "run", "verify")
GOOD: dict[str, dict[str, Any]] = {
    "run": {"recipe": "magnitude/50", "model": "m", "output": "o"},
    "plan": {"recipe": "magnitude/50", "model": "m"},
    "evaluate": {"model": "m"},
    "measure": {"models": ["m"]},
    "latency": {"model": "m"},
    "compare": {"paths": ["m"]},
    "export": {"model": "m", "output": "o", "format": "gguf"},
    "verify": {"model": "m"},
    "load": {"path": "m"},
    "inspect": {"model": "m"},
}
NONE_OF_THEM = object()
"""A value of no argument's type."""


def arguments() -> Iterator[tuple[str, str]]:
    for name in CHECKED:
        for argument in inspect.signature(getattr(compresso, name)).parameters:
            yield name, argument


@pytest.mark.parametrize(("name", "argument"), [*arguments()])
def test_every_argument_is_held_to_its_type(
    name: str, argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for wrong in (NONE_OF_THEM, 2 + 3j, {1: 2}, [NONE_OF_THEM]):
        with pytest.raises(ArgumentError, match=f"^{argument}=.*: wanted ") as error:
            getattr(compresso, name)(**GOOD[name] | {argument: wrong})
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 300
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"keep": "half"}, "keep='half': wanted a number or None, got str"),
        ({"max_steps": 1.5}, "max_steps=1.5: wanted a whole number or None, got float"),
        ({"layout": 3}, "layout=3: wanted a string, got int"),
        ({"sets": [1]}, "sets=[1]: wanted a list of strings, got a list of int"),
        ({"sets": "a=1"}, "sets='a=1': wanted a list of strings; give sets=['a=1']"),
        ({"seed": True, "model": None}, "model=None: wanted a string, a path or a transformers.PreTrainedModel"),
        ({"data": ["x"]}, "data=['x']: wanted a string, a path or None, got a list of str"),
        ({"overwrite": "no"}, "overwrite='no': wanted True or False, got str"),
        ({"model": " "}, "model=' ' is empty; wanted a path"),
        ({"output": ""}, "output='' is empty; wanted a path"),
        ({"model": "a\0b"}, "model='a\\x00b' holds a NUL"),
        ({"sedd": 3}, "run has no argument 'sedd'; did you mean 'seed'?"),
        ({"dataset": "d.jsonl"}, "run has no argument 'dataset'; give data="),
        ({"speedup": [1.5]}, "speedup=[1.5]: wanted a string, a number or None, got a list of float"),
    ],
)  # fmt: skip
def test_what_is_said_of_a_wrong_argument(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError) as error:
        compresso.run(**GOOD["run"] | change)
    assert str(error.value).startswith(said)


def test_arguments_that_are_missing_are_named() -> None:
    with pytest.raises(ArgumentError, match="missing a required argument: 'output'; wanted at least recipe, model"):
        compresso.run("magnitude/50", "m")  # type: ignore[call-arg]


def test_what_is_right_goes_in_as_it_is() -> None:
    @public
    def taken(count: int, share: float | None = None, dtype: str | torch.dtype = "x", *, on: bool = False) -> list[Any]:
        return [count, share, dtype, on]

    dtype = torch.float16
    found = taken(np.int64(3), 1, dtype, on=True)  # type: ignore[arg-type]
    assert found == [3, 1, torch.float16, True]
    assert type(found[0]) is int
    assert found[2] is dtype


def test_words_of_the_interface_in_use() -> None:
    @public
    def refuse(batch_size: int) -> None:
        raise BudgetError(f"--batch {batch_size}: wanted less; lower --keep or add --overwrite")

    with pytest.raises(BudgetError, match=r"^batch_size=3: wanted less; lower keep= or add overwrite=True$"):
        refuse(3)
    with command_line(), pytest.raises(BudgetError, match=r"^--batch 3: wanted less; lower --keep or add --overwrite$"):
        refuse(3)
    with pytest.raises(BudgetError, match=r"^batch_size=3"):  # the block's end
        refuse(3)


@pytest.mark.parametrize(
    ("said", "in_words"),
    [
        ("--keep and --macs are two budgets", "keep= and macs= are two budgets"),
        ("--keep 1.5: the share", "keep=1.5: the share"),
        ("--layout 'unifrom' is unknown", "layout='unifrom' is unknown"),
        ("--set stages.x.y=2: wanted", "sets=['stages.x.y=2']: wanted"),
        ("give --data with a name, such as --data rows.jsonl.", "give data= with a name, such as data='rows.jsonl'."),
        ("evaluate with --prompt off, or", "evaluate with prompt='off', or"),
        ("leave --layout or --offload out", "leave layout= or offload=True out"),
        ("leave this out with --no-memory", "leave this out with memory=False"),
        ("see `compresso run`, `compresso recipes`", "see `compresso.run`, `compresso recipes`"),
        ("npm --ignore-scripts --prefix x", "npm --ignore-scripts --prefix x"),
    ],
)
def test_options_become_arguments(said: str, in_words: str) -> None:
    assert in_python(said) == in_words
    assert in_python(in_words) == in_words


def options() -> dict[str, set[str]]:
    """The options of each command."""
    program = get_command(app)
    assert isinstance(program, typer.core.TyperGroup)
    return {
        name: {word[2:] for one in command.params for word in (*one.opts, *one.secondary_opts) if word[:2] == "--"}
        for name, command in program.commands.items()
    }


def test_every_option_has_its_argument() -> None:
    for command, names in options().items():
        if command not in CHECKED:
            continue
        takes = inspect.signature(getattr(compresso, command)).parameters
        for name in names - {"json", "help", "for"}:
            if name in FLAGS:
                assert FLAGS[name].partition("=")[0] in takes, name
            else:
                assert any(argument in takes for argument in VALUED[name]), name


def sentences() -> Iterator[tuple[Path, str]]:
    """Every text of the package that is no docstring, with holes of f-strings as 0.5; not those of the command line
    itself, nor commands of engines and reports, which are for a shell.
    """
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0]
        if room in ("cli", "report", "native", "wording.py") or path.name == "launch.py":
            continue
        tree = ast.parse(path.read_text("utf-8"))
        inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
        documents = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        } | {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "0.5" for part in node.values)
                yield path, "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner | documents:
                yield path, node.value


OF_OTHERS = re.compile(
    r"^(compresso export|llama-cli|vllm serve|npm|node-llama|--?[a-z-]+$)|var\(--|vllm serve|npm install"
    r"|llama-gguf-split|accelerate launch"
)
"""Commands for a shell, and options of other programs."""
_AND_ON = (
    "a again all alone and are as at before belong by exists for goes in is it names now of on or out outside that to"
    " was were will with wrote would"
)
SENTENCE_GOES_ON = set(_AND_ON.split())


def test_tasks_and_formats_are_values_of_their_options_in_python_too() -> None:
    for option, values in {"task": tasks(), "format": FORMATS}.items():
        for value in values:
            assert in_python(f"give --{option} {value}") == f"give {option}='{value}'"


def test_messages_name_options_that_exist_and_can_be_said_in_python() -> None:
    known = set().union(*options().values())
    seen = 0
    for path, text in sentences():
        if OF_OTHERS.search(text):
            continue
        for found in re.finditer(r"(?<![\w-])--([a-z][a-z-]*[a-z])(?: ([a-z]+)(?![\w./,-]))?", text):
            seen += 1
            assert found[1] in known, f"{path.name}: --{found[1]} is no option ({text!r})"
            if found[1] in VALUED and found[2]:
                assert found[2] in CHOICES | SENTENCE_GOES_ON, f"{path.name}: a value or not? {found[0]!r}"
        assert not re.search(r"(?<![\w-])--[a-z]", in_python(text)), f"{path.name}: {in_python(text)!r}"
    assert seen > 50


def test_messages_name_no_argument_that_the_command_line_calls_otherwise() -> None:
    knobs = {knob for card in cards().values() for knob in card.knobs} | {one.name for one in knobs_of(DataKnobs)}
    knobs |= {ROUNDS, TARGETS}  # of every stage that removes units
    names = {text.partition("=")[0] for text in FLAGS.values()} | {name for names in VALUED.values() for name in names}
    called = re.compile(rf"(?<![\w.`])({'|'.join(sorted(names - knobs))})=")
    for path, text in sentences():
        room = path.relative_to(PACKAGE).parts[0]
        if room in ("metrics", "door.py", "solve", "training", "methods", "core", "discover"):
            continue  # not reached with what a person wrote
        if text in ("force=", "overwrite=", "overwrite=, allow_collapsed= or both", "stream=", "offload="):
            continue  # a deprecation that only Python's arguments have
        assert not called.search(text), f"{path.name}: {text!r}"


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", ""),
        ("run", "magnitude/50", "--model", "", "--output", "o"),
        ("run", "magnitude/50", "--model=", "--output", "o"),
        ("run", "magnitude/50", "--model", "m", "--output", ""),
        ("evaluate", "m", "--output", ""),
    ],
)
def test_an_empty_text_is_not_the_current_folder(
    arguments: tuple[str, ...], call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, error = call(*arguments)
    assert code == 2
    assert "is given an empty text; give a value" in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_command_line_keeps_its_words(call: Call) -> None:
    code, _, error = call("plan", "magnitude-structured", "--model", "m", "--keep", "7")
    assert code == 2
    assert "--keep 7.0: the kept share" in error
    with pytest.raises(CompressoError, match=r"^keep=7: the kept share"):
        compresso.plan("magnitude-structured", "m", keep=7)


def test_functions_that_are_checked_are_functions() -> None:
    for name in CHECKED:
        function: Callable[..., Any] = getattr(compresso, name)
        assert hasattr(function, "__wrapped__"), name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "magnitude/50", "--model", "x" * 300, "--output", "o"), "--model 'xxx"),
        (("run", "magnitude/50", "--model", "m", "--data", "x" * 300, "--output", "o"), "--data 'xxx"),
        (("inspect", "x" * 300), "model 'xxx"),
        (("compare", "x" * 300), "paths ['xxx"),
        (("evaluate", "m", "--data-root", "x" * 300), "--data-root 'xxx"),
    ],
)
def test_the_command_line_reads_its_own_words_at_the_door(arguments: tuple[str, ...], said: str, call: Call) -> None:
    code, _, error = call(*arguments)
    assert code == 2
    assert error.startswith(f"ArgumentError: {said}")
    assert "is 300 letters long" in error
