"""What `compresso evaluate --suite refusal` and `--suite trust` take beside what `evaluate` takes: their options, the
models that these name, and where answers are kept.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from compresso.checkpoint.source import Source, open_source
from compresso.checkpoint.writes_text import refuse_textless
from compresso.data.instructions import encode_conversation
from compresso.data.records import Message
from compresso.errors import CheckpointError, DataError, nearest
from compresso.metrics.record import Setting
from compresso.metrics.trust.journal import Journal, tokenizer_digest

SUITES = ("refusal", "trust")
_TRUST_ALONE = ("--scoring", "--generations", "--scorer", "--scorer-label")


@dataclass(frozen=True)
class TrustOptions:
    """What these suites alone take, as `evaluate` says."""

    prompts: str | Path | None = None
    benign: str | Path | None = None
    judge: str | Path | None = None
    judge_labels: str | Path | None = None
    against: str | Path | None = None
    answers: str | Path | None = None
    new_tokens: int | None = None
    scoring: str = "likelihood"
    generations: int = 25
    scorer: str | Path | None = None
    scorer_label: str | None = None
    attention: bool = False

    def given(self) -> list[str]:
        """The options that are not as they stand here, as they are typed."""
        return [
            f"--{name.replace('_', '-')}"
            for name, value in vars(self).items()
            if value != type(self).__dataclass_fields__[name].default
        ]


def refuse_options_of(suite: str | None, options: TrustOptions) -> None:
    """Raise DataError for options that a suite does not take."""
    takes = {
        "refusal": {
            "--prompts",
            "--benign",
            "--judge",
            "--judge-labels",
            "--against",
            "--answers",
            "--new-tokens",
            "--attention",
        },
        "trust": {"--against", "--answers", *_TRUST_ALONE},
    }.get(suite or "", set[str]())
    for option in options.given():
        if option not in takes:
            owners = "--suite trust" if option in _TRUST_ALONE else "--suite refusal"
            owners = "--suite refusal or trust" if option in ("--against", "--answers") else owners
            raise DataError(f"{option} belongs to {owners}; leave it out, or give that suite")


def opened(path: str | Path, option: str) -> Source:
    """A model that an option names. Raises CheckpointError, naming the option."""
    try:
        source = open_source(path, packed=True)
    except CheckpointError as error:
        raise CheckpointError(f"{option}: {error}") from error
    if not source.tensors:
        raise CheckpointError(f"{option} {path} has no weights; give a folder of safetensors or a GGUF file")
    refuse_textless(source, f"{option} takes models that write text")
    return source


def place_of(source: Source) -> Path:
    """The file or folder that a model's weights are read from."""
    place = source.file or source.folder
    assert place is not None  # what has weights lies somewhere
    return place


def journal_of(folder: str | Path | None, source: Source, same: Mapping[str, Setting]) -> Journal | None:
    """The journal of a model's answers in a folder that was named; None where none was.

    Raises:
        DataError: a file goes by that name.
        ResumeError: its answers were asked otherwise.
    """
    if folder is None:
        return None
    folder = Path(folder).expanduser()
    refuse_answers(folder)
    digest = hashlib.sha256(json.dumps(dict(same), sort_keys=True).encode()).hexdigest()[:12]
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in source.name)[:60]
    return Journal(folder / f"{name}-{digest}.jsonl", same)


def words_of(tokenizer: PreTrainedTokenizerBase, prompt_on: bool) -> str:
    """A hash of how a model is asked, which weights do not say: its tokenizer, and its chat format."""
    ids = encode_conversation(tokenizer, [Message("system", "a"), Message("user", "b")], prompt_on)
    told = json.dumps([ids, tokenizer_digest(tokenizer)])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def refuse_answers(folder: str | Path | None) -> None:
    """Raise DataError where --answers names a file."""
    if folder is not None and (place := Path(folder).expanduser()).exists() and not place.is_dir():
        raise DataError(f"--answers {place} is a file; name a folder, which keeps each model's answers")


def check_suite_words(suite: str, options: TrustOptions, corpus: str | None, protocol: str | None) -> None:
    """Raise DataError for words that do not go with one of these suites."""
    if corpus is not None or protocol is not None:
        raise DataError(
            f"--suite {suite} goes without --corpus and --protocol; evaluate perplexity in a call of its own"
        )
    refuse_options_of(suite, options)
    if options.scoring not in ("likelihood", "sampled"):
        raise DataError(
            f"--scoring '{options.scoring}' is unknown; {nearest(options.scoring, ('likelihood', 'sampled'))}"
        )
    if options.scorer is not None and options.scoring == "likelihood":
        raise DataError("--scorer is for texts, and --scoring likelihood writes none to read; give --scoring sampled")
    if options.scorer_label is not None and options.scorer is None:
        raise DataError("--scorer-label is a label of --scorer, and none was named; give both")
    if options.scoring == "likelihood" and "--generations" in options.given():
        raise DataError(
            f"--generations {options.generations} says how many texts are drawn, and --scoring likelihood draws none;"
            " leave it out, or give --scoring sampled"
        )
    if options.generations < 1:
        raise DataError(f"--generations {options.generations}: wanted at least 1")
