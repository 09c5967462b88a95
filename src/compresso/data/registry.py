"""From what a person writes after --data to records: registered names, hub ids, local files, and several of them joined
by commas.

    alpaca-gpt4                     a registered name
    owner/name or owner/name:config a data set on the hub
    answers.jsonl                   a local file
    answers/ or 'part-*.jsonl'      a folder of files, or a pattern of their names; see `shards`
    answers.jsonl,wikitext2         both; text and instructions in one training set recover a pruned model better than
                                    instructions alone

A registered name is read from the hub. Where the environment variable COMPRESSO_DATA names a folder with local copies,
those stand in, and the description says which file did and how it differs. The embedded world needs neither.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

from compresso.core.counted import counted
from compresso.data import hub
from compresso.data.bad_lines import skips
from compresso.data.columns import TEXTS
from compresso.data.formats import SUFFIXES, collect, read_file, suffix_of
from compresso.data.hub import HubSet
from compresso.data.record_forms import NAMED_BAD, BadRecord, RecordForm, records_from, unused_of
from compresso.data.records import Record, Records, joint_kind
from compresso.data.shards import is_pattern, shards, unread
from compresso.errors import DataError, nearest

WORLD_ROWS = 8000
"""Rows of the embedded world when no limit is given."""


@dataclass(frozen=True, slots=True)
class LocalCopy:
    """A file under COMPRESSO_DATA that can stand in for a split, and what sets it apart from the original."""

    file: str
    remark: str


@dataclass(frozen=True, slots=True)
class Registered:
    """A registered name: its place on the hub, the columns that matter, the rows read by default, and local copies per
    split.
    """

    hub: HubSet
    columns: tuple[str, ...]
    rows: int | None = None
    local: dict[str, LocalCopy] | None = None


_ALPACA_COLUMNS = ("instruction", "input", "output")
_ALPACA_FILE = "datasets/instruct/alpaca_subset.jsonl.gz"
_C4_SAMPLE = LocalCopy("datasets/text/c4_sample_300.jsonl.gz", "300 documents")
REGISTERED: dict[str, Registered] = {
    "alpaca": Registered(
        HubSet("tatsu-lab/alpaca"), _ALPACA_COLUMNS, local={"train": LocalCopy(_ALPACA_FILE, "a third of it")}
    ),
    "alpaca-gpt4": Registered(
        HubSet("vicgalle/alpaca-gpt4"),
        _ALPACA_COLUMNS,
        local={"train": LocalCopy(_ALPACA_FILE, "a part of the first Alpaca, not GPT-4's answers")},
    ),
    "alpaca-cleaned": Registered(
        HubSet("yahma/alpaca-cleaned"),
        _ALPACA_COLUMNS,
        local={"train": LocalCopy(_ALPACA_FILE, "a part of the first Alpaca, not cleaned")},
    ),
    "c4": Registered(
        HubSet(
            "allenai/c4",
            files={
                "train": "en/c4-train.00000-of-01024.json.gz",
                "validation": "en/c4-validation.00000-of-00008.json.gz",
            },
        ),
        ("text",),
        rows=20_000,
        local={"train": _C4_SAMPLE, "validation": _C4_SAMPLE},
    ),
    "wikitext2": Registered(
        HubSet("Salesforce/wikitext", "wikitext-2-raw-v1"),
        ("text",),
        local={
            "train": LocalCopy(
                "datasets/text/wikitext2_raw_train_part.jsonl.gz", "a part of the training split, without headings"
            ),
            "test": LocalCopy("datasets/text/wikitext2_raw_test.jsonl.gz", "the whole split"),
        },
    ),
}
WORLD_NAMES = ("world", "world-text", "world-instructions")
NAMES = (*REGISTERED, *WORLD_NAMES)
_HUB_ID = re.compile(r"(?P<id>[\w][\w.-]*/[\w][\w.-]*)(:(?P<config>[\w.-]+))?")


def load_records(
    data: str | Path,
    *,
    split: str = "train",
    seed: int = 0,
    limit: int | None = None,
    skip_bad: bool | None = False,
    local: str | Path | None = None,
    form: RecordForm = TEXTS,
) -> Records:
    """Read everything that `data` names, in the order it is named.

    Args:
        data: a name, hub id or file, or several joined by commas.
        split: the split of a registered name or hub id; a local file is read whole.
        seed: draws the rows of the embedded world.
        limit: most rows per source.
        skip_bad: skip and count bad lines instead of raising; None: raising, where the caller has no such choice.
        local: a folder with local copies of registered names; that of COMPRESSO_DATA if None.
        form: what a row holds.

    Raises:
        DataError: an unknown name, data that cannot be reached, or a file that is empty or malformed (with file and
            line).
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit}: wanted at least 1 row")
    parts = [str(data)] if isinstance(data, Path) or Path(data).exists() else [part.strip() for part in data.split(",")]
    if not all(parts):
        raise DataError(f"--data {str(data)!r} names an empty source; wanted names or files, joined by single commas")
    sources = [_one(part, split, seed, limit, skip_bad, local, form) for part in parts]
    if len(sources) == 1:
        return sources[0]
    rows = [row for source in sources for row in source.rows]
    return Records(
        kind=joint_kind(rows),
        rows=rows,
        source=" + ".join(source.source for source in sources),
        n_bad=sum(source.n_bad for source in sources),
        bad=tuple(chain.from_iterable(source.bad for source in sources)),
        parts=tuple((source.source, len(source.rows)) for source in sources),
        columns=dict(sum((Counter(source.columns) for source in sources), Counter[str]())),
        passed_over=dict(sum((Counter(source.passed_over) for source in sources), Counter[str]())),
        places=[source.place(index) for source in sources for index in range(len(source.rows))],
        notes=tuple(chain.from_iterable(source.notes for source in sources)),
    )


def _one(
    name: str,
    split: str,
    seed: int,
    limit: int | None,
    skip_bad: bool | None,
    local: str | Path | None,
    form: RecordForm,
) -> Records:
    if name in WORLD_NAMES:
        return _world(name, seed, limit or WORLD_ROWS, form)
    if name in REGISTERED:
        return _registered(name, split, limit, skip_bad, local, form)
    path = Path(name).expanduser()
    if path.is_dir() and form.folder is not None and (rows := list(form.folder(path))):
        return _folder(path, rows, limit, skip_bad, form)
    if path.is_dir() or is_pattern(name):
        return _shards(name, split, limit, skip_bad, form)
    if path.exists() or suffix_of(path):
        return _file(path, limit, skip_bad, form)
    if match := _HUB_ID.fullmatch(name):
        return _from_hub(HubSet(match["id"], match["config"]), None, split, limit, name, skip_bad, form)
    raise DataError(f"data '{name}' is neither a registered name nor a file; {nearest(name, NAMES)}")


def _file(path: Path, limit: int | None, skip_bad: bool | None, form: RecordForm) -> Records:
    read = read_file(path, skip_bad, limit, form)
    return Records(
        joint_kind(read.rows),
        read.rows,
        path.name,
        read.n_bad,
        read.bad,
        columns=read.columns,
        passed_over=read.passed_over,
        places=read.places,
    )


def _folder(
    path: Path, rows: Sequence[tuple[str, object]], limit: int | None, skip_bad: bool | None, form: RecordForm
) -> Records:
    """The rows of a folder of files that are rows themselves. Raises DataError for one that is none."""
    read = collect(path, rows[:limit], skip_bad, form)
    return Records(
        joint_kind(read.rows),
        read.rows,
        f"{path.name} ({counted(len(rows), 'picture')})",
        read.n_bad,
        read.bad,
        columns=read.columns,
        passed_over=read.passed_over,
        places=read.places,
        notes=unread(path, {cell for _, row in rows if isinstance(row, dict) for cell in row.values()}),
    )


def _shards(name: str, split: str, limit: int | None, skip_bad: bool | None, form: RecordForm) -> Records:
    """The files of a folder or of a pattern, one behind the other, as one source."""
    rows: list[Record] = []
    places: list[str] = []
    bad: list[str] = []
    n_bad = 0
    files: set[Path] = set()
    columns: Counter[str] = Counter()
    passed_over: Counter[str] = Counter()
    for path in shards(name, SUFFIXES, split, "" if form.folder is None else form.wanted):
        left = None if limit is None else limit - len(rows)
        if left == 0:
            break
        read = read_file(path, skip_bad, left, form, like=rows[0] if rows else None)
        rows += read.rows
        places += read.places
        bad += read.bad
        n_bad += read.n_bad
        files.add(path)
        columns.update(read.columns)
        passed_over.update(read.passed_over)
    folder = Path(name).expanduser()
    told = f"{folder.name} ({counted(len(files), 'file')})"
    return Records(
        joint_kind(rows),
        rows,
        told,
        n_bad,
        tuple(bad[:NAMED_BAD]),
        columns=dict(columns),
        passed_over=dict(passed_over),
        places=places,
        notes=unread(folder, files) if folder.is_dir() and limit is None else (),
    )


def _registered(
    name: str, split: str, limit: int | None, skip_bad: bool | None, local: str | Path | None, form: RecordForm
) -> Records:
    known = REGISTERED[name]
    folder = local or os.environ.get("COMPRESSO_DATA")
    copy = (known.local or {}).get(split)
    if folder and copy and (path := Path(folder) / copy.file).is_file():
        return replace(
            _file(path, limit, skip_bad, form), source=f"{name} {split}, local copy {path.name} ({copy.remark})"
        )
    return _from_hub(known.hub, known.columns, split, limit or known.rows, name, skip_bad, form)


def _from_hub(
    place: HubSet,
    columns: tuple[str, ...] | None,
    split: str,
    limit: int | None,
    name: str,
    skip_bad: bool | None,
    form: RecordForm,
) -> Records:
    rows = hub.rows(place, split, limit)
    if not rows:
        raise DataError(f"data set {place.id}, split '{split}', has no rows; choose another split")
    if columns and (missing := [column for column in columns if column not in rows[0]]):
        raise DataError(f"data set {place.id} has no column {', '.join(missing)}; it has {', '.join(rows[0])}")
    kept = [{column: row[column] for column in columns} for row in rows] if columns else rows
    part = f"first {len(rows)} rows of " if limit == len(rows) else ""
    left = Counter(unused for row in rows for unused in unused_of(row, columns)) if columns else {}
    try:
        records = records_from(kept, f"{name} {split} ({part}{place.id} on the hub)", form, bool(skip_bad))
        return replace(records, passed_over={**left, **records.passed_over})
    except BadRecord as error:
        raise DataError(
            f"{error}. Download the data as a file and repair such rows{skips(skip_bad, ' them')}."
        ) from error


def _world(name: str, seed: int, n: int, form: RecordForm) -> Records:
    """Documents and instructions of the embedded world; `world` takes them in turn, so that any beginning of it holds
    both.
    """
    from compresso.data import world

    documents = ({"text": text} for text in world.documents(n, seed))
    match name:
        case "world-text":
            rows: Iterator[dict[str, str]] = documents
        case "world-instructions":
            rows = world.instructions(n, seed)
        case _:
            pairs = zip(world.instructions((n + 1) // 2, seed), documents, strict=False)
            rows = (row for pair in pairs for row in pair)
    try:
        return records_from(islice(rows, n), f"{name}, seed {seed}, {n} rows", form)
    except BadRecord as error:
        raise DataError(f"{error}. Give data of the task's own kind") from error
