"""The generated parts of README.md: the table of methods, from their cards and recipes, and the tree, from the folders.

    python scripts/readme.py           says whether README.md is fresh; exits with 1 if it is stale
    python scripts/readme.py --write   refreshes it

Between `<!-- NAME -->` and `<!-- /NAME -->` stands what this writes, and nothing else of the page changes. A method or
a recipe more changes the table alone: the tree ends above their folders.
"""

import argparse
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from compresso.runner.recipe import build, names, read
from compresso.stage import Card, Effects, cards

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PACKAGE = "src/compresso/"
MOST_RECIPES = 14
"""A stage in more recipes than these begins those of other papers, too, which have their own rows, or ends most."""
PHRASES = {
    ".ci/": "what every change must pass, in one script",
    ".github/": "the same on GitHub: a fast lane and the whole",
    "benchmarks/": "speed and quality, measured; the results beside the scripts",
    "docs/": "how it is built, how to extend it, what goes wrong, what was tried",
    "requirements/": "the versions it is tested with",
    "scripts/": "how the embedded model was trained; the generated parts of this page",
    PACKAGE: "the package; its own files are the job, the stages' contract, loading and errors",
    "tests/": "mirrors the package, file for file",
    ".gitignore": "",
    ".pre-commit-config.yaml": "the checks before a commit",
    "CHANGELOG.md": "",
    "CONTRIBUTING.md": "how to change it",
    "LICENSE": "",
    "Makefile": "setup, demo, test, check",
    "README.md": "",
    "pyproject.toml": "the package, its tools, its import rule",
    PACKAGE + "arch/": "what can be removed from each architecture, one file each",
    PACKAGE + "checkpoint/": "reading model folders without trusting them, writing folders whole or not at all",
    PACKAGE + "cli/": "the command line: parse, call, print",
    PACKAGE + "commands/": "one module a command: the function behind it, and what it prints",
    PACKAGE + "core/": "pure mathematics on tensors: axes, cost, budgets, gates, losses",
    PACKAGE + "data/": "from files and names to token ids and labels; the embedded model and its world",
    PACKAGE + "discover/": "the axes of a model nobody described, from a trace of one forward",
    PACKAGE + "edit/": "the only code that changes a model: masks, shapes, adapters",
    PACKAGE + "engines/": "parity checks: what is written, opened in each engine and compared",
    PACKAGE + "formats/": "layouts, writing, reopening",
    PACKAGE + "methods/": "one file a method",
    PACKAGE + "metrics/": "perplexity, tasks, divergence, texts, size, speed, memory; the collapse guard",
    PACKAGE + "native/": "model classes for layers of different widths",
    PACKAGE + "observe/": "passes that change nothing: statistics over hooked sites, scores, losses",
    PACKAGE + "recipes/": "one folder a method, one file a configuration",
    PACKAGE + "report/": "tables, charts, the HTML page and the model card, from records",
    PACKAGE + "runner/": "from a recipe to a checkpoint: checks, dry runs, stages, results",
    PACKAGE + "solve/": "from scores and a budget to a plan: pools, shares, integer programming",
    PACKAGE + "stage/": "the stage contract: knob groups, what a stage may offer, the registry",
    PACKAGE + "sweep/": "block after block, each on the outputs of the edited blocks before it",
    PACKAGE + "tasks/": "what a run trains and judges by, one file a task",
    PACKAGE + "training/": "the training loop: order, noise, processes, checkpoints, progress",
}
"""What the tree says of a path."""


def methods() -> str:
    """The table of stages: those that remove units, that change weights, that only follow others."""
    used: dict[str, list[str]] = {}
    first, papers = set[str](), dict[str, str]()
    for name in names():
        recipe = build(read(name), name)
        stages, papers[name] = [stage for stage, _ in recipe.stages], recipe.paper
        first.add(stages[0])
        for stage in stages:
            used.setdefault(stage, []).append(name)
    follows = used.keys() - first
    rows = sorted(cards().values(), key=lambda card: (_group(card, card.name in follows), card.name))
    for card in rows:
        if card.name in first and len(used[card.name]) > MOST_RECIPES:
            used[card.name] = [name for name in used[card.name] if papers[name] == card.paper]
    table = [_row(card, used.get(card.name, [])) for card in rows]
    return "\n".join(["| stage | recipes | what it does | paper | needs |", "|---|---|---|---|---|", *table])


def _group(card: Card, follows: bool) -> int:
    """0 of a stage that removes units, 2 of one that only follows others, 1 of the rest."""
    return 0 if Effects.SHAPES in card.effects else 2 if follows else 1


def _row(card: Card, recipes: list[str]) -> str:
    where = ", ".join(f"`{name}`" for name in recipes) or "none of its own"
    if len(recipes) > MOST_RECIPES:
        where = f"the last stage of {len(recipes)} recipes"
    needs = [need for need in card.needs if not (need == "gradients" and "training" in card.needs)]
    return f"| `{card.name}` | {where} | {card.title} | {card.paper or '-'} | {', '.join(needs) or 'nothing'} |"


def tree() -> str:
    """The repository's folders, down to the rooms of the package.

    Raises SystemExit if a path has no phrase, or a phrase no path.
    """
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    files = [Path(line) for line in listed if (ROOT / line).exists()]
    there = {str(path) for path in files if len(path.parts) == 1}
    there |= {f"{path.parts[0]}/" for path in files if len(path.parts) > 1 and path.parts[0] != "src"}
    there |= {
        "/".join(path.parts[:n]) + "/"
        for path in files
        if path.parts[0] == "src"
        for n in (2, 3)
        if len(path.parts) > n
    }
    if odd := sorted(there ^ PHRASES.keys()):
        raise SystemExit(
            f"{', '.join(odd)}: the tree and the phrases in {Path(__file__).name} differ; add or remove one"
        )
    order = [path for path in PHRASES if "/" not in path[:-1] or path == PACKAGE]
    folders = sorted((path for path in order if path.endswith("/")), key=lambda path: path)
    tops = [*folders, *sorted(path for path in order if not path.endswith("/"))]
    rooms = sorted(path for path in PHRASES if path.startswith(PACKAGE) and path != PACKAGE)
    lines = ["compresso/"]
    for top in tops:
        lines.append(_line("└── " if top == tops[-1] else "├── ", top, PHRASES[top]))
        for room in rooms if top == PACKAGE else ():
            branch = "└── " if room == rooms[-1] else "├── "
            lines.append(_line("│   " + branch, room.removeprefix(PACKAGE), PHRASES[room]))
    return "\n".join(["```", *lines, "```"])


def _line(branch: str, name: str, phrase: str) -> str:
    return f"{branch + name:<30} {phrase}".rstrip()


def refreshed(page: str, parts: Mapping[str, str]) -> str:
    """The page with these parts between their markers. Raises SystemExit if a marker is missing."""
    for name, text in parts.items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if len(marked.findall(page)) != 1:
            raise SystemExit(f"README.md wants one part between <!-- {name} --> and <!-- /{name} -->")
        page = marked.sub(lambda match, text=text: f"{match[1]}{text}\n{match[2]}", page)
    return page


def main() -> None:
    """Compare, or write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="refresh README.md")
    write = parser.parse_args().write
    page = README.read_text("utf-8")
    fresh = refreshed(page, {"methods": methods(), "tree": tree()})
    if write:
        README.write_text(fresh, "utf-8")
    elif fresh != page:
        raise SystemExit("README.md is stale; refresh it with: python scripts/readme.py --write")


if __name__ == "__main__":
    main()
