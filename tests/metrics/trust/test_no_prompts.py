"""No prompt of the trust data sets is in the repository: their first and last words are looked for, by their hashes."""

import hashlib
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
HASHES = Path(__file__).with_name("prompt_hashes.txt")
TEXTS = {".py", ".md", ".yaml", ".yml", ".json", ".jsonl", ".txt", ".toml", ".jinja", ".html", ".csv", ".mjs", ".cfg"}


def hashes() -> dict[int, set[str]]:
    """Number of words -> hashes of so many."""
    found: dict[int, set[str]] = {}
    for line in HASHES.read_text().splitlines():
        n, digest = line.split()
        found.setdefault(int(n), set()).add(digest)
    return found


def prompts_in(text: str, known: dict[int, set[str]]) -> list[str]:
    """The runs of words whose hash is listed."""
    words = re.findall(r"[a-z0-9']+", text.lower())
    return [
        run
        for n, digests in known.items()
        for i in range(len(words) - n + 1)
        if hashlib.sha256((run := " ".join(words[i : i + n])).encode()).hexdigest()[:12] in digests
    ]


def files() -> list[Path]:
    """What git would commit."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip(f"git: the tree is no checkout: {listed.stderr.strip()}")
    return [path for name in listed.stdout.splitlines() if (path := ROOT / name).suffix in TEXTS and path.is_file()]


@pytest.mark.slow
def test_no_prompt_is_in_the_repository() -> None:
    known = hashes()
    assert sum(map(len, known.values())) > 2000
    hits = {
        str(path.relative_to(ROOT)): found
        for path in files()
        if (found := prompts_in(path.read_text("utf-8", "replace"), known))
    }
    assert not hits, f"prompts of the data sets: { ({name: len(found) for name, found in hits.items()}) }"


def test_a_prompt_would_be_found() -> None:
    """Whatever stands around it, and whichever way its words are set."""
    words = ["somebody", "asks", "for", "a", "thing", "nobody", "should", "get"]
    known = {8: {hashlib.sha256(" ".join(words).encode()).hexdigest()[:12]}}
    assert prompts_in('x = "Somebody asks:\n    for a THING nobody should get!" # more', known)
    assert not prompts_in("somebody asks for a thing everybody should get", known)
