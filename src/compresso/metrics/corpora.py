"""Texts to measure on, by name or file, and where they came from.

    wikitext2        the raw test split
    c4               the beginning of the validation split
    notes.txt        any local file of texts that training data could be read from, whole
    owner/name       a data set on the hub

A local copy stands in for a named corpus where one is there; what sets it apart from the original is said in
`Corpus.source`.
"""

from dataclasses import dataclass
from pathlib import Path

from compresso.core.counted import counted
from compresso.data.formats import suffix_of
from compresso.data.registry import REGISTERED, load_records
from compresso.data.shards import is_pattern
from compresso.data.survival import passed_over
from compresso.errors import DataError
from compresso.metrics.protocol import usual_split


@dataclass(frozen=True)
class Corpus:
    """Texts and their origin.

    Args:
        name: what measurements are named after: the registered name, or the stem of the file.
        split: "all" for a local file.
        texts: the documents in order, empty ones included.
        source: where they came from, in words, without folders.
        sha256: identity of the texts, wherever they came from.
        passed_over: columns that were not read, in words; "" if there are none.
    """

    name: str
    split: str
    texts: tuple[str, ...]
    source: str
    sha256: str
    passed_over: str = ""

    @property
    def remark(self) -> str:
        """The sentence that stands beside a number on these texts."""
        beside = f" Columns passed over: {self.passed_over}." if self.passed_over else ""
        return f"Texts: {self.source}; {counted(len(self.texts), 'document')}.{beside}"


def corpus(name_or_file: str | Path, split: str | None = None, data_root: str | Path | None = None) -> Corpus:
    """Read a corpus.

    Args:
        name_or_file: "wikitext2", "c4", another registered name, a hub id, or a file.
        split: None: the one that a corpus is measured on.
        data_root: a folder with local copies of the named corpora; that of the environment variable COMPRESSO_DATA if
            None.

    Raises:
        DataError: what is unknown, cannot be reached, has no text, or is made of instructions or ready windows.
    """
    name, path = str(name_or_file), Path(name_or_file)
    if name not in REGISTERED and (suffix := suffix_of(path)):
        name, usual = path.name[: -len(suffix)], "all"
    elif name not in REGISTERED and (path.expanduser().is_dir() or is_pattern(name)):
        name, usual = path.expanduser().name, "test"
    else:
        usual = "test" if "/" in name else usual_split(name)
    split = split or usual
    if data_root is not None and not Path(data_root).is_dir():
        raise DataError(f"{data_root}: no such folder; give the folder of local copies that COMPRESSO_DATA would name")
    records = load_records(name_or_file, split=split, skip_bad=None, local=data_root)
    if records.kind != "text":
        raise DataError(
            f"corpus {records.source} holds data of kind '{records.kind}'; perplexity is measured on texts: give such a"
            " file"
        )
    texts = tuple(records.texts())
    if not any(text.strip() for text in texts):
        raise DataError(f"corpus {records.source}: all of its {len(texts)} texts are empty; give a file with text")
    return Corpus(
        name, split, texts, records.source, records.sha256, passed_over(records) if records.passed_over else ""
    )
