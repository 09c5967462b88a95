"""Tasks of the harness with their rows at hand: everything about data that can go wrong does so here, before a model is
opened.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compresso.checkpoint.scratch import scratch_folder
from compresso.data.hub import cache_only, why_silent
from compresso.errors import CompressoError, DataError, first_line
from compresso.metrics.tasks.copies import FOLDER, config
from compresso.metrics.tasks.quiet import quiet
from compresso.metrics.tasks.suites import Bench, suites_of

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager


@dataclass(frozen=True, slots=True)
class Ready:
    """A task and its rows.

    Args:
        bench: what it is.
        task: the harness's object.
        data: what a protocol says of the rows' origin.
        shots: examples before a question.
    """

    bench: Bench
    task: "ConfigurableTask"
    data: dict[str, str] = field(default_factory=dict[str, str])
    shots: int = 0


@dataclass(frozen=True, slots=True)
class ReadySuite:
    """A suite whose tasks are ready; `name` is None for a task that was asked for by itself."""

    name: str | None
    tasks: tuple[Ready, ...]
    weights: Literal["tasks", "items"]


def data_folder(data_root: str | Path | None, holds: Path = FOLDER) -> Path | None:
    """Where local files lie: the given folder, else that of the environment variable COMPRESSO_DATA, else None.

    Args:
        data_root: the given folder, if any.
        holds: the folder in it that is read, for errors.

    Raises:
        DataError: the given one is no folder.
    """
    found = data_root or os.environ.get("COMPRESSO_DATA")
    if not found:
        return None
    if not (path := Path(found).expanduser()).is_dir():
        named = "data root" if data_root else "COMPRESSO_DATA"
        raise DataError(f"{named} {found} is not a folder; give one that holds {holds}/")
    return path.resolve()


def prepare(
    tasks: str | Sequence[str], *, data_root: str | Path | None = None, num_fewshot: int | None = None, seed: int = 0
) -> tuple[ReadySuite, ...]:
    """Find tasks and their rows: in the package, in local files below `data_root`, or on the hub.

    Args:
        tasks: suites or tasks.
        data_root: folder with local files; None: that of COMPRESSO_DATA, if set.
        num_fewshot: shots instead of each task's own.
        seed: of shots that are drawn.

    Raises:
        DataError: an unknown name, rows that cannot be reached or are malformed, or shots that a local file does not
            hold.
        ResourceError: lm_eval is not installed.
    """
    root = data_folder(data_root)
    suites = suites_of(tasks, root)
    if num_fewshot is not None and num_fewshot < 0:
        raise DataError(f"num_fewshot={num_fewshot}: wanted 0 or more")
    from lm_eval.tasks import TaskManager

    with quiet(), scratch_folder() as folder:
        manager = TaskManager(include_defaults=False)
        ready = partial(_ready, manager, root, Path(folder), num_fewshot, seed, {})
        return tuple(ReadySuite(suite.name, tuple(map(ready, suite.benches)), suite.weights) for suite in suites)


def _ready(
    manager: "TaskManager",
    root: Path | None,
    folder: Path,
    num_fewshot: int | None,
    seed: int,
    asked: dict[str, str],
    bench: Bench,
) -> Ready:
    shots = bench.shots if num_fewshot is None else num_fewshot
    task, data = _loaded(manager, root, folder, asked, bench)
    if shots and data.get("data", "").startswith("local") and not _has_shots(task):
        raise DataError(
            f"task '{bench.name}' has no examples for {shots} shots in its local file; leave num_fewshot out"
        )
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=seed)
    return Ready(bench, task, data, shots)


def _loaded(
    manager: "TaskManager", root: Path | None, folder: Path, asked: dict[str, str], bench: Bench
) -> "tuple[ConfigurableTask, dict[str, str]]":
    """The harness's task with its rows, and what is to be said of them; `asked` remembers which data sets the hub is
    silent about.
    """
    if bench.copy is None:
        task = _one(manager, bench.path)
        kwargs = task.config.dataset_kwargs
        return task, {"data": f"embedded world, {kwargs['n']} held-out items drawn with seed {kwargs['seed']}"}
    missing = bench.copy.missing(root) if root else None
    if root and not missing:
        task = _changed(manager, folder, bench, bench.copy.settings(root), local=True)
        return task, bench.copy.provenance(root)
    wanted = str(missing or FOLDER / next(iter(bench.copy.files.values())))
    cure = f"{'Put' if root else 'Give --data-root (or COMPRESSO_DATA) with'} {wanted}{' there' if root else ''}"
    if bench.hub is None:
        raise DataError(f"task '{bench.name}' is not on the hub. {cure}.")
    if bench.hub not in asked:
        asked[bench.hub] = why_silent(bench.hub)
    silent = asked[bench.hub]
    with _from_hub(bench, silent, cure):
        return _changed(manager, folder, bench, {}, local=False), {"data": f"hub {bench.hub}"}


@contextmanager
def _from_hub(bench: Bench, silent: str, cure: str) -> Iterator[None]:
    """Turns whatever goes wrong while the harness fetches a data set into one line."""
    try:
        with cache_only() if silent else nullcontext():
            yield
    except CompressoError:
        raise
    except Exception as error:  # `datasets` and the hub's client fail in many ways; all of them mean no rows
        reason = silent or first_line(error)
        raise DataError(
            f"task '{bench.name}': data set {bench.hub} is not in the local cache, and {reason}. "
            f"{cure}, or fetch it where there is a network."
        ) from error


def _changed(manager: "TaskManager", folder: Path, bench: Bench, settings: dict[str, Any], local: bool) -> Any:
    """The harness's task with `settings` and the bench's own changes."""
    path = folder / f"{bench.name}.yaml"
    path.write_text(config(bench.path, {**bench.changes, **settings}, local), "utf-8")
    return _one(manager, path)


def _one(manager: "TaskManager", path: Path) -> Any:
    """The one task that a YAML describes."""
    (task,) = manager.load(str(path))["tasks"].values()
    return task


def _has_shots(task: "ConfigurableTask") -> bool:
    """Whether examples come from elsewhere than the rows that are scored."""
    return task.config.fewshot_split is not None or task.fewshot_cfg.samples is not None
