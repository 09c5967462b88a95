"""The prose is true of the code: its examples run, and the paths, commands, recipes, knobs and names in it exist.

The Python blocks of the how-tos run in order, as one module each, on copies of the registries. The README's first block
runs on a tiny model with two updates a stage; all other blocks must compile. What stands in backticks is looked up in
the repository.
"""

import functools
import json
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import types
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import compresso
from compresso import cli
from compresso.arch import base
from compresso.data import nano
from compresso.runner import recipe
from compresso.runner.options import with_options
from compresso.stage import registry

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "compresso"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
HOW_TOS = ["adding_a_method.md", "adding_an_architecture.md"]
COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PATH = re.compile(r"[\w.-]*(/[\w.-]+)*(/|\.(py|md|yaml|toml|txt|json|jsonl|svg))")
OF_A_RUN = {
    "identity.json",
    "records.json",
    "plan.json",
    "recipe.yaml",
    "config.json",
    "training/",
    "stages/",
    "demo-output/",
    "answers.jsonl",
}
"""Paths that a run writes or a user brings."""
TO_BE_WRITTEN = {"methods/random_structured.py", "recipes/random-structured/default.yaml", "arch/ministral.py"}
"""What the how-tos add."""
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    return [text for name, text in BLOCK.findall(page.read_text("utf-8")) if name == language]


def quoted(page: Path) -> list[str]:
    """What stands in backticks outside of blocks; the README's results name files that come and go."""
    text = re.sub(r"<!-- results -->.*?<!-- /results -->", "", page.read_text("utf-8"), flags=re.DOTALL)
    return [
        token
        for token in re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))
        if "NAME" not in token and "OUTPUT" not in token
    ]


def commands(page: Path) -> list[list[str]]:
    """The shell commands in a page's blocks, split into words, without comments."""
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@functools.cache
def words_of_the_code() -> frozenset[str]:
    files = [
        *PACKAGE.rglob("*.py"),
        *PACKAGE.rglob("*.yaml"),
        *(ROOT / "tests").rglob("*.py"),
        ROOT / "pyproject.toml",
        ROOT / "Makefile",
    ]
    files.remove(Path(__file__))
    return frozenset(word for file in files for word in re.findall(r"\w+", file.read_text("utf-8")))


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of the registries, so that what an example registers is gone after the test."""
    registry.cards(), base.arch_for(LlamaConfig())  # fills them first
    monkeypatch.setattr(registry, "_CARDS", dict(registry._CARDS))
    monkeypatch.setattr(base, "_described", list(base._described))


def run_blocks(page: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    module = types.ModuleType(f"example_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for text in blocks(page, "python"):
        exec(compile(text, str(page), "exec"), module.__dict__)
    return module.__dict__


@every_page
def test_python_blocks_compile(page: Path) -> None:
    for text in blocks(page, "python"):
        compile(text, str(page), "exec")


@pytest.mark.parametrize("name", HOW_TOS)
def test_how_tos_run(name: str, registries: None, monkeypatch: pytest.MonkeyPatch) -> None:
    page = ROOT / "docs" / name
    defined = run_blocks(page, monkeypatch)
    for key, function in defined.items():
        if key.startswith("test_"):
            function()
    for text in blocks(page, "yaml"):
        built = recipe.build(recipe.parse(text, name), name)
        assert built.stages and built.title
    assert "random_structured" in registry.cards() if "method" in name else "MINISTRAL" in defined


@pytest.mark.slow
def test_the_readme_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    widths = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    LlamaForCausalLM(LlamaConfig(**widths, vocab_size=1024, bos_token_id=0, eos_token_id=1)).save_pretrained("my-model")
    AutoTokenizer.from_pretrained(nano.path()).save_pretrained("my-model")
    Path("my-data.jsonl").write_text(
        "".join(json.dumps({"text": f"The {i}th cat sat on the mat."}) + "\n" for i in range(24))
    )
    real = compresso.run

    def shortened(name: str, *args: Any, **kwargs: Any) -> compresso.Result:
        raw = recipe.with_knob(recipe.read(name), "max_steps", 2)
        for path, value in {"data.held": 4, "data.pack": False, "stages.learn_gates.score_batches": 1}.items():
            raw = recipe.override(raw, path, value)
        return real(raw, *args, quiet=True, **kwargs)

    monkeypatch.setattr(compresso, "run", shortened)
    exec(blocks(ROOT / "README.md", "python")[0], {})
    printed = capsys.readouterr().out.splitlines()
    before, after = (json.loads("{" + part + "}") for part in re.findall(r"\{([^}]*)\}", printed[1].replace("'", '"')))
    assert after["blocks"] <= 0.7 * before["blocks"] and after["embeddings"] == before["embeddings"]


@every_page
def test_commands_are_those_of_the_program(page: Path) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    inline = [token.split() for token in quoted(page) if re.match(r"(compresso|make) \w", token)]
    for program, *args in [*commands(page), *inline]:
        if program == "make":
            assert args[0] in targets, args
        elif program == "pip":
            assert set(re.findall(r"\[(\w+)\]", args[-1])) <= extras.keys(), args
        elif program == "compresso":
            assert args[0] in COMMANDS, args
    for program, *args in commands(page):
        if program == "compresso":
            given = COMMANDS[args[0]].make_context(args[0], list(args[1:])).params  # a usage error fails here
            if "recipe" in given:
                recipe.build(with_options(given["recipe"], model="", keep=given["keep"], sets=given["sets"] or []))


@every_page
def test_paths_exist(page: Path) -> None:
    file = ROOT
    for token in quoted(page):
        name, _, test = token.partition("::")
        if test:
            file = ROOT / name if name else file
            assert f"def {test}(" in file.read_text("utf-8"), f"{file.name} has no {test}"
        elif (
            PATH.fullmatch(token)
            and not token.startswith((".json", ".txt", ".parquet", ".gz"))
            and token not in OF_A_RUN | TO_BE_WRITTEN
        ):
            places = [ROOT / token, PACKAGE / token, *([] if "/" in token else PACKAGE.rglob(token))]
            assert any(place.exists() for place in places), f"{page.name} names {token}, which does not exist"
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
        assert (page.parent / link).exists(), link


def value_of(raw: dict[str, Any], path: str) -> Any:
    """A knob's own value in a recipe, to set it to once more; a knob that is not there is set to something."""
    whole = recipe.build(raw).to_dict()
    kind, *parts = path.split(".")
    held: Any = (
        whole["data"] if kind == "data" else {name: knobs for one in whole["stages"] for name, knobs in one.items()}
    )
    for part in parts:
        held = held.get(part) if isinstance(held, dict) else None
    return held


@every_page
def test_names_exist(page: Path) -> None:
    knobs = {knob for card in registry.cards().values() for knob in card.knobs} | {
        field.name for field in fields(recipe.DataKnobs)
    }
    flags = {flag for command in COMMANDS.values() for option in command.params for flag in option.opts}
    folders = tuple(path.name + "/" for path in (PACKAGE / "recipes").iterdir())
    for token in quoted(page):
        for flag in re.findall(r"(?<!\S)'?(--[a-z-]+)", token):
            assert flag in flags, f"{page.name}: no command has {flag}"
        if token.startswith("--set "):
            path = re.sub(r"^--set '?|=.*$", "", token)
            raw = recipe.read("compresso")
            recipe.build(recipe.override(raw, path, value_of(raw, path)))
        if (knob := re.fullmatch(r"(\w+): [\w.{\[].*", token)) is not None:
            assert knob[1] in knobs, f"{page.name}: no stage has the knob {knob[1]}"
        if token.startswith(folders) and not token.endswith("/"):
            assert token in recipe.names(), f"{page.name}: no recipe is called {token}"
        if re.fullmatch(r"@?[A-Za-z_][\w.]*(\(.*\))?(\.\w+)?", token) and not PATH.fullmatch(token):
            for name in re.findall(r"\w+", token.partition("(")[0]):
                assert name in words_of_the_code() | {"random_structured"}, (
                    f"{page.name} names {token}, and no code does"
                )


def test_the_readme_says_what_it_must() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert "make demo" in text and "make test" in text
    assert 0 < text.find("<!-- results -->") < text.find("<!-- /results -->")
    for card in registry.cards().values():
        assert f"| `{card.name}` |" in text and card.paper in text, f"the table of methods lacks {card.name}"
    for name in recipe.names():
        assert f"`{name}`" in text, f"the table of methods lacks the recipe {name}"


@pytest.mark.slow
def test_the_readme_is_fresh() -> None:
    """Its tables and tree are what `scripts/readme.py` makes of the registry and the folders."""
    if subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, check=False).returncode:
        pytest.skip("git: no checkout, so the files of the repository are not known")
    ran = subprocess.run([sys.executable, ROOT / "scripts" / "readme.py"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_a_method_more_changes_the_generated_table_alone(registries: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The how-to's method, as if it were one of the repository's, needs no other word in the README."""
    readme = runpy.run_path(str(ROOT / "scripts" / "readme.py"))
    page = (ROOT / "README.md").read_text("utf-8")
    run_blocks(ROOT / "docs" / "adding_a_method.md", monkeypatch)
    fresh = readme["refreshed"](page, {"methods": readme["methods"](), "tree": readme["tree"]()})
    assert "| `random_structured` |" in fresh
    outside = re.compile(r"<!-- methods -->.*<!-- /methods -->", re.DOTALL)
    assert outside.sub("", fresh) == outside.sub("", page)
    with pytest.raises(SystemExit, match="wants one part between <!-- nothing -->"):
        readme["refreshed"](page, {"nothing": ""})


def test_the_table_of_rooms_is_the_import_rule() -> None:
    rules = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    (floors,) = (rule["layers"] for rule in rules if rule["type"] == "layers")
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    section = page.split("## Rooms and the import rule\n", 1)[1].split("\n## ", 1)[0]
    rows = [re.findall(r"`(\w+)`", row.split("|")[1]) for row in section.splitlines() if row.startswith("| `")]
    assert rows == [floor.split(" : ") for floor in floors]
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert {room for row in rows for room in row} == rooms - {"__init__"}
