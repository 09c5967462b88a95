"""What a teacher says of some examples, on disk, so that it need not be in memory while its student learns.

Examples lie in chunks, `batch-000003/`: what was kept of the distribution at each place that counts, place after place
and example after example, with a manifest of hashes that is written last. A chunk is whole or absent, and a damaged one
is written again. `same.json` says whose chunks these are. Chunks are read from the disk each time they are asked for.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from compresso.checkpoint.atomic import Json, new_folder, verify_manifest, write_json, write_manifest
from compresso.checkpoint.identity import refuse_other_run
from compresso.core import strict_json
from compresso.errors import CheckpointError

log = logging.getLogger(__name__)
CHUNK = 64
"""Examples of a chunk."""
_NAME = re.compile(r"batch-(\d{6,})")
_FILE = "teacher.safetensors"


@dataclass(frozen=True)
class Taught:
    """What was kept of a teacher's distributions.

    Args:
        outcomes: the most probable ones of each place [places, k], int32.
        log_probs: of these, and of the rest together where there is one [places, k + 1], float32.
    """

    outcomes: Tensor
    log_probs: Tensor


def bytes_of(places: int, top: int, outcomes: int) -> int:
    """What so many places take on disk, headers aside: `top` outcomes of 4 bytes each, and log-probabilities of them
    and of the rest.
    """
    kept = min(top, outcomes)
    return places * (8 * kept + (4 if kept < outcomes else 0))


class TeacherStore:
    """The chunks of one training. Several processes may write different ones, once one of them has called `begin`.

    Args:
        folder: where they lie; made with the first.
        same: what must be equal for a resume to go on with them, as JSON: the run, the knobs, the weights, the rows.
        rows: the examples that are kept, by their places in the data, in the order of the chunks.
        places: how many places of each of these count.
    """

    def __init__(self, folder: Path, same: Mapping[str, Json], rows: Sequence[int], places: Sequence[int]) -> None:
        self._folder = folder
        self._same: dict[str, Json] = json.loads(json.dumps(same))
        self.chunks = [list(rows[start : start + CHUNK]) for start in range(0, len(rows), CHUNK)]
        self._where: dict[int, tuple[int, int, int]] = {}
        for number, chunk in enumerate(self.chunks):
            here = places[number * CHUNK : number * CHUNK + len(chunk)]
            for row, end, n in zip(chunk, accumulate(here), here, strict=True):
                self._where[row] = (number, end - n, end)

    def missing(self) -> list[int]:
        """Numbers of the chunks that are not there, or not whole.

        Raises:
            ResumeError: those that are there are another training's.
        """
        there = sorted(path.name for path in self._folder.glob("batch-*") if _NAME.fullmatch(path.name))
        if there:
            refuse_other_run(self._folder, self._read_same(), self._same)
        return [number for number in range(len(self.chunks)) if not self._whole(number)]

    def begin(self) -> None:
        """Say whose chunks these will be. Raises ResourceError if the disk refuses."""
        if self._read_same() != self._same:  # nobody's, or of another training that was killed before its first chunk
            self._folder.mkdir(parents=True, exist_ok=True)
            write_json(self._folder / "same.json", self._same)

    def write(self, number: int, taught: Sequence[Taught]) -> None:
        """Keep a chunk: what the teacher says of each of its examples, in their order. Raises ResourceError if the disk
        refuses.
        """
        self.begin()
        with new_folder(self._folder / self._name(number), force=True) as folder:
            tensors = {
                "outcomes": torch.cat([one.outcomes for one in taught]).to(torch.int32).contiguous(),
                "log_probs": torch.cat([one.log_probs for one in taught]).float().contiguous(),
            }
            save_file(tensors, folder / _FILE)
            write_manifest(folder)

    def read(self, rows: Sequence[int]) -> Taught:
        """What the teacher says of some of the examples, one after the other, on the CPU.

        Raises:
            KeyError: an example that is not kept.
        """
        found: list[Taught] = []
        for row in rows:
            number, begin, end = self._where[row]
            with safe_open(str(self._folder / self._name(number) / _FILE), framework="pt") as file:
                outcomes, log_probs = (file.get_slice(name)[begin:end] for name in ("outcomes", "log_probs"))
            found.append(Taught(outcomes, log_probs))
        return Taught(torch.cat([one.outcomes for one in found]), torch.cat([one.log_probs for one in found]))

    def _whole(self, number: int) -> bool:
        path = self._folder / self._name(number)
        if not path.is_dir():
            return False
        try:
            verify_manifest(path)
        except CheckpointError as damage:
            log.warning("the teacher is asked again: %s", damage)
            return False
        return True

    def _read_same(self) -> dict[str, Json]:
        """Whose chunks these are; nobody's if the file is gone or damaged."""
        try:
            return strict_json.loads((self._folder / "same.json").read_bytes())
        except (OSError, ValueError):
            return {}

    def _name(self, number: int) -> str:
        return f"batch-{number:06d}"
