"""The state of a pass over data that is not done yet, so that a stopped one goes on with the same numbers.

The entry `batch-000016/` holds every statistic after 16 batches. It is whole or absent; the one before it is removed
when it is there.
"""

import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from compresso.checkpoint.atomic import Json, new_folder, verify_manifest, write_json, write_manifest
from compresso.checkpoint.identity import refuse_other_run
from compresso.core import strict_json
from compresso.errors import CheckpointError
from compresso.observe.folds import Stats

log = logging.getLogger(__name__)
_NAME = re.compile(r"batch-\d{6,}")


@dataclass(frozen=True)
class State:
    """How far a pass is.

    Args:
        n_batches: those it has seen.
        data: sha256 of these.
        stats: by name.
    """

    n_batches: int
    data: str
    stats: Mapping[str, Stats]


class FoldJournal:
    """Where one pass keeps its state; for one process at a time.

    Args:
        folder: made with the first entry.
        same: what must be equal for a resume to continue the same pass, as JSON: the run, the knobs, the weights.
        every: batches between two entries.
    """

    def __init__(self, folder: Path, same: Mapping[str, Json], every: int = 16) -> None:
        self.folder, self.every = folder, every
        self._same: dict[str, Json] = json.loads(json.dumps(same))

    def latest(self) -> State | None:
        """The newest whole entry, each tensor on the device it was on, or on the CPU where this machine has no such
        device. Raises ResumeError if it is another pass's.
        """
        for path in reversed(self._entries()):
            try:
                verify_manifest(path)
            except CheckpointError as damage:
                log.warning("statistics are taken again: %s", damage)
                continue
            facts = strict_json.loads((path / "facts.json").read_bytes())
            refuse_other_run(path, facts["same"], self._same)
            tensors = load_file(path / "statistics.safetensors")
            stats = {
                name: Stats(tensors[name].to(_there(device)), n)
                for name, (n, device) in sorted(facts["statistics"].items())
            }
            return State(facts["n_batches"], facts["data"], stats)
        return None

    def write(self, state: State) -> None:
        """Replace the entry. Raises ResourceError if the disk refuses."""
        entry = self.folder / f"batch-{state.n_batches:06d}"
        with new_folder(entry, force=True) as folder:
            tensors = {name: stats.total.detach().cpu().contiguous() for name, stats in state.stats.items()}
            save_file(tensors, folder / "statistics.safetensors")
            facts: dict[str, Json] = {
                "same": self._same,
                "n_batches": state.n_batches,
                "data": state.data,
                "statistics": {name: [stats.n, str(stats.total.device)] for name, stats in state.stats.items()},
            }
            write_json(folder / "facts.json", facts)
            write_manifest(folder)
        for path in self.folder.iterdir():
            if path != entry and _NAME.match(path.name.removeprefix(".")):
                shutil.rmtree(path)

    def _entries(self) -> list[Path]:
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(path for path in found if _NAME.fullmatch(path.name))


def _there(device: str) -> str:
    """The device itself, or "cpu" on a machine that does not have it."""
    wanted, there = torch.device(device), torch.accelerator.current_accelerator(check_available=True)
    known = there is not None and there.type == wanted.type and (wanted.index or 0) < torch.accelerator.device_count()
    if wanted.type == "cpu" or known:
        return device
    log.warning("statistics of a pass on %s go on on the CPU", device)
    return "cpu"
