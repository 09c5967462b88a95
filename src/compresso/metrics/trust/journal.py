"""Answers written down as they come, one a line, so that a stopped evaluation goes on where it was.

    {"same": {...}}                                          whose answers they are
    {"id": "...", "asked": "...", "text": "..."}             a written answer
    {"id": "...", "asked": "...", "weights": [...]}          log-probabilities of choices

`asked` is a hash of the request: the file holds answers, and no prompt. A line that was cut short is asked again.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from compresso.checkpoint.atomic import write_text
from compresso.checkpoint.identity import refuse_other_run
from compresso.checkpoint.storage import storage_errors
from compresso.core import strict_json
from compresso.errors import CheckpointError, ResumeError
from compresso.metrics.trust.asking import Answer, Limits, Request, Respondent
from compresso.training.progress import Progress

log = logging.getLogger(__name__)
TOGETHER = 8
"""Requests asked between two writes, where nothing else is said."""
OPENING = 48
"""Characters by which requests that begin alike are known."""
T = TypeVar("T")


class Journal:
    """The answers of one model in one file; for one process at a time.

    Args:
        path: the file; made with the first answer.
        same: what must be equal for the answers to count: the model, and how it is asked.
    """

    def __init__(self, path: Path, same: Mapping[str, Any]) -> None:
        self.path, self._same = path, json.loads(json.dumps(dict(same)))
        self._entries = self._read()

    def __len__(self) -> int:
        return len(self._entries)

    def known(self, id: str, asked: str) -> dict[str, Any] | None:
        """What was answered to a request, or None. Raises ResumeError if another request went by that id."""
        entry = self._entries.get(id)
        if entry is not None and entry.get("asked") != asked:
            raise ResumeError(
                f"{self.path}: '{id}' was another request when it was answered; the prompts changed, or how long"
                " answers may be. Remove the file, or name another --answers"
            )
        return entry

    def add(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Append lines, on disk when this returns. Raises ResourceError: the disk refuses."""
        with storage_errors(self.path):
            if not self.path.exists():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_text(self.path, json.dumps({"same": self._same}) + "\n")
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(dict(entry), allow_nan=False) + "\n" for entry in entries)
                file.flush()
                os.fsync(file.fileno())
        self._entries |= {str(entry["id"]): dict(entry) for entry in entries}

    def _read(self) -> dict[str, dict[str, Any]]:
        """The whole lines of the file; what follows a damaged one is removed from it and asked again.

        Raises:
            ResumeError: they are another model's, or were asked otherwise.
            CheckpointError: the file is no journal.
        """
        if not self.path.exists():
            return {}
        lines = self.path.read_bytes().split(b"\n")
        whole: list[dict[str, Any]] = []
        for line in lines[:-1]:  # what follows the last line break was cut short, or is empty
            try:
                value = strict_json.loads(line)
            except ValueError:
                break
            if not isinstance(value, dict) or (whole and not _is_entry(value)):
                break
            whole.append(value)
        if not whole or not isinstance(whole[0].get("same"), dict):
            raise CheckpointError(f"{self.path} is no journal of answers; name another --answers")
        refuse_other_run(self.path, whole[0]["same"], self._same)
        if len(whole) < len(lines) - 1 or lines[-1]:
            log.warning("%s: line %d is damaged; it and what follows is asked again", self.path, len(whole) + 1)
            write_text(self.path, "".join(json.dumps(one) + "\n" for one in whole))
        return {str(one.get("id")): one for one in whole[1:]}


def _is_entry(value: Mapping[str, Any]) -> bool:
    """Whether a line after the first holds an answer as it was written."""
    if not (isinstance(value.get("id"), str) and isinstance(value.get("asked"), str)):
        return False
    if "text" in value:
        return isinstance(value["text"], str) and all(
            isinstance(value.get(one), bool) for one in ("degenerate", "fits")
        )
    if "weights" in value:
        mine = value["weights"]
        return mine is None or (isinstance(mine, list) and all(type(one) in (int, float) for one in mine))
    return isinstance(value.get("looks"), dict)


class Journalled:
    """A respondent whose answers are shown as they come, and written down where there is a journal.

    Args:
        respondent: who is asked what the journal does not hold.
        journal: None keeps nothing.
        progress, name: display.
        together: requests asked between two writes, of which the respondent finds those that begin alike.
    """

    def __init__(
        self,
        respondent: Respondent,
        journal: Journal | None = None,
        progress: Progress | None = None,
        name: str = "",
        together: int = TOGETHER,
    ) -> None:
        self._respondent, self._journal, self._together = respondent, journal, together
        self._progress, self._name = progress or Progress("silent"), name

    def write(self, requests: Sequence[Request], limits: Limits) -> list[Answer]:
        """As the respondent's."""
        keys = [_key(one, limits.new_tokens, limits.whole) for one in requests]
        return self._all(
            [f"write {one.id}" for one in requests],
            requests,
            keys,
            ask=lambda places: self._respondent.write([requests[i] for i in places], limits),
            out=lambda one: {"text": one.text, "degenerate": one.degenerate, "fits": one.fits},
            back=lambda entry: Answer(entry["text"], entry["degenerate"], entry["fits"]),
        )

    def weigh(self, requests: Sequence[Request], choices: Sequence[Sequence[str]]) -> list[list[float] | None]:
        """As the respondent's."""
        keys = [_key(one, *mine) for one, mine in zip(requests, choices, strict=True)]
        return self._all(
            [f"weigh {one.id}" for one in requests],
            requests,
            keys,
            ask=lambda places: self._respondent.weigh([requests[i] for i in places], [choices[i] for i in places]),
            out=lambda one: {"weights": one},
            back=lambda entry: None if entry["weights"] is None else [float(one) for one in entry["weights"]],
        )

    def _all(
        self,
        ids: Sequence[str],
        requests: Sequence[Request],
        keys: Sequence[str],
        ask: Callable[[Sequence[int]], list[T]],
        out: Callable[[T], Mapping[str, Any]],
        back: Callable[[Mapping[str, Any]], T],
    ) -> list[T]:
        """What the journal holds, and what is asked for the rest, of like opening and length together: what requests
        begin with is then read once, and few are padded.
        """
        found: dict[int, T] = {}
        for i, (id, key) in enumerate(zip(ids, keys, strict=True)):
            entry = None if self._journal is None else self._journal.known(id, key)
            if entry is not None:
                found[i] = back(entry)
        open_ = sorted((i for i in range(len(requests)) if i not in found), key=lambda i: _order(requests[i]))
        with self._progress.running(len(requests), len(found), self._name):
            for begin in range(0, len(open_), self._together):
                places = open_[begin : begin + self._together]
                answers = ask(places)
                found |= dict(zip(places, answers, strict=True))
                if self._journal is not None:
                    self._journal.add(
                        [{"id": ids[i], "asked": keys[i], **out(one)} for i, one in zip(places, answers, strict=True)]
                    )
                self._progress.step(len(found), self._name, {}, 0)
        return [found[i] for i in range(len(requests))]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all of a tokenizer that decides what a model is asked: its tokens, special ones, and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    tokens = sorted(tokenizer.get_vocab().items()) if backend is None else json.loads(backend.to_str())
    if isinstance(tokens, dict):  # these two change as texts are encoded
        tokens = {key: value for key, value in tokens.items() if key not in ("padding", "truncation")}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    text = json.dumps([type(tokenizer).__name__, tokens, special, tokenizer.chat_template], sort_keys=True)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _order(request: Request) -> tuple[str, str, int]:
    """Templates by their opening, so that it is the same for many; then by length."""
    shown = "".join(a + b for a, b in request.shown)
    return request.system, (shown + request.text)[:OPENING], len(shown) + len(request.text)


def _key(request: Request, *settings: object) -> str:
    """A hash of what is asked and of how it is answered."""
    return journal_key(request.system, request.shown, request.text, request.seed, *map(str, settings))


def journal_key(*asked: object) -> str:
    """A hash of what is asked, which a journal keeps in its place."""
    text = json.dumps(asked)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
