"""Writes the hashes by which a test finds prompts of the trust data sets, should somebody put one into the repository:

    python scripts/trust_hashes.py FOLDER > tests/metrics/trust/prompt_hashes.txt

FOLDER holds `decodingtrust/` and `eval-safety/`. A line is the number of words and a hash of them; the words themselves
cannot be told from it.
"""

import csv
import gzip
import hashlib
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

WORDS, LEAST = 8, 5
"""Words of a prompt that are hashed, the first and the last ones; shorter ones as a whole, down to `LEAST`."""
MOST = 400
"""Prompts of a file, evenly spaced."""


def words_of(text: str) -> list[str]:
    """The words of a text, without case and marks."""
    return re.findall(r"[a-z0-9']+", text.lower())


def digest(words: list[str]) -> str:
    """What stands for some words."""
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:12]


def texts(path: Path) -> Iterator[str]:
    """The prompts of one file."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text, name = raw.decode(), path.name
    if ".yaml" in name:
        yield from leaves(yaml.load(text, yaml.CSafeLoader))
    elif ".csv" in name:
        for row in csv.DictReader(io.StringIO(text)):
            yield from (
                value for key, value in row.items() if key in ("input", "scenario", "user_prompt", "system_prompt")
            )
    elif ".jsonl" in name:
        for line in text.splitlines():
            row = json.loads(line)
            yield str(row.get("prompt") or row.get("input"))
    elif "ood" in name or "tasks" in name:
        yield from leaves(json.loads(text))


def leaves(value: object) -> Iterator[str]:
    """Every text in nested mappings and lists; of questions and sentences, these alone."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key in ("question_sentence", "sentence"):
            if key in value:
                yield str(value[key])
                return
        for one in value.values():
            yield from leaves(one)
    elif isinstance(value, list):
        for one in value:
            yield from leaves(one)


def main(folder: Path) -> None:
    """Print the list."""
    found: set[tuple[int, str]] = set()
    for path in sorted(folder.glob("*/*")):
        every = list(texts(path))
        for text in every[:: max(1, len(every) // MOST)]:
            words = words_of(text)
            if len(words) >= LEAST:
                found |= {(len(part), digest(part)) for part in (words[:WORDS], words[-WORDS:])}
    for n, hashed in sorted(found):
        print(n, hashed)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
