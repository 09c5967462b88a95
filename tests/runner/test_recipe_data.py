"""A recipe file names data of its own folder or the working folder; whatever lies elsewhere is not opened, and a person
may still name it.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from compresso.errors import RecipeError
from compresso.runner.options import with_options
from compresso.runner.recipe_data import source_of

_opened: list[str] | None = None


def _record(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and _opened is not None:
        _opened.append(str(arguments[0]))


sys.addaudithook(_record)


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Paths that are opened while a test runs."""
    global _opened
    _opened = []
    yield _opened
    _opened = None


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe in a folder of its own, seen from a working folder, in a home with a private file."""
    for name in ("home", "recipes", "work"):
        (tmp_path / name).mkdir()
    (tmp_path / "home" / "private.txt").write_text("xyzzy")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "recipes" / "r.yaml"


def write(recipe: Path, source: str) -> None:
    recipe.write_text(yaml.safe_dump({"data": {"source": source}, "stages": ["wanda"]}))


def asked(recipe: Path, **given: object) -> object:
    return source_of(with_options(recipe, model="unread", **given))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "source",
    [
        "~/private.txt",
        "~root/private.txt",
        "../home/private.txt",
        "inner/../../home/private.txt",
        "{home}/private.txt",
        "file.jsonl,~/private.txt",
        "alpaca-gpt4, ../home/private.txt",
        "..\\home\\private.txt",
        "C:\\private.txt",
        "../home/*.txt",
        "/etc/*",
        "a\nb.txt",
        "a\0b.txt",
        "link.txt",
        "links",
        "links/*.txt",
        "lin?.txt",
    ],
)
def test_what_leads_out_is_refused_unread(source: str, recipe: Path, opened: list[str]) -> None:
    private = recipe.parent.parent / "home" / "private.txt"
    for folder in (recipe.parent, Path.cwd()):
        (folder / "link.txt").symlink_to(private)
        (folder / "links").mkdir()
        (folder / "links" / "a.txt").symlink_to(private)
    write(recipe, source.format(home=private.parent))
    with pytest.raises(RecipeError, match=r"recipe r\.yaml: data\.source .* give others with --data") as raised:
        asked(recipe)
    assert "\n" not in str(raised.value)
    assert not [path for path in opened if "private" in path]


def test_a_person_may_name_it(recipe: Path) -> None:
    """By either option, with which the file's own is not looked at."""
    write(recipe, "~/private.txt")
    assert asked(recipe, data="../home/private.txt") == "~/private.txt"
    assert asked(recipe, sets=["data.source=~/private.txt"]) == "~/private.txt"
    assert asked(recipe, sets=["data.source=../home/private.txt"]) == "../home/private.txt"
    raw = {"data": {"source": "~/private.txt"}, "stages": ["wanda"]}  # a mapping is its caller's own
    assert source_of(with_options(raw, model="unread")) == "~/private.txt"


@pytest.mark.parametrize(
    "source",
    ["alpaca-gpt4", "owner/name", "owner/name:config", "world,wikitext2", "absent.jsonl", "inner/absent.jsonl"],
)
def test_names_and_files_to_come_stay_as_they_are(source: str, recipe: Path) -> None:
    (recipe.parent / "world").write_text("a file of a registered name")
    write(recipe, source)
    assert asked(recipe) == source


def test_a_file_is_found_in_either_folder(recipe: Path) -> None:
    (recipe.parent / "beside.txt").write_text("text")
    (Path.cwd() / "here.txt").write_text("text")
    write(recipe, "beside.txt, here.txt")
    assert asked(recipe) == f"{recipe.parent / 'beside.txt'},here.txt"
    (Path.cwd() / "beside.txt").write_text("text")
    assert asked(recipe) == "beside.txt,here.txt"
    (recipe.parent / "kept").mkdir()
    (recipe.parent / "kept" / "a.txt").write_text("text")
    (recipe.parent / "link.txt").symlink_to("kept/a.txt")
    write(recipe, "link.txt")
    assert asked(recipe) == str(recipe.parent / "link.txt")
