"""The harness' bars, shown as everything else that takes long is: lines by the clock in a log, a bar on a terminal.

The harness draws with the `tqdm` of its modules, into logs too. While a block runs, these names are a class of ours
that counts the same steps.
"""

import importlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from compresso.training.progress import PATIENCE, Progress

_DRAWING = ("lm_eval.api.task", "lm_eval.api.model", "lm_eval.models.huggingface")


@contextmanager
def bars_shown_by(progress: Progress) -> Iterator[None]:
    """While the block runs, what the harness counts is shown by `progress`; what it does not name is not shown."""
    modules: list[Any] = [importlib.import_module(name) for name in _DRAWING]
    theirs = [module.tqdm for module in modules]
    begun: list[_Steps] = []

    def drawn(iterable: Iterable[Any] = (), **how: Any) -> _Steps:
        begun.append(_Steps(progress, iterable, how))
        return begun[-1]

    for module in modules:
        module.tqdm = drawn
    try:
        yield
    finally:
        for module, its in zip(modules, theirs, strict=True):
            module.tqdm = its
        for one in reversed(begun):  # an error may have left one open
            one.close()


class _Steps:
    """As much of tqdm as the harness uses."""

    def __init__(self, progress: Progress, iterable: Iterable[Any], how: dict[str, Any]) -> None:
        """how: tqdm's keywords, of which `total`, `desc` and `disable` count."""
        self._progress, self._iterable, self._done, self._open = progress, iterable, 0, ExitStack()
        self._shown = bool(how.get("desc") and how.get("total")) and not how.get("disable")
        if self._shown:
            self._open.enter_context(progress.running(int(how["total"]), 0, "scoring requests", PATIENCE))

    def __iter__(self) -> Iterator[Any]:
        for one in self._iterable:
            yield one
            self.update()
        self.close()

    def update(self, n: int = 1) -> None:
        """So many steps more are done."""
        self._done += n
        if self._shown:
            self._progress.step(self._done, "scoring requests", {}, 0)

    def close(self) -> None:
        """Nothing more is to be shown."""
        self._shown = False
        self._open.close()
