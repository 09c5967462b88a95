"""A journal of blocks that a sweep is done with, so that a killed run goes on with the same weights, bit for bit.

An entry `step-000003/` holds the weights that block 3 got and what was noted of them. It is written beside its name,
forced to disk, sealed with a manifest and renamed: it is whole or absent. A damaged entry is done again, and all after
it, whose inputs came from it.
"""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from compresso.checkpoint.atomic import new_folder, verify_manifest, write_json, write_manifest
from compresso.checkpoint.identity import refuse_other_run
from compresso.core import strict_json
from compresso.errors import CheckpointError
from compresso.training.ranks import Ranks

log = logging.getLogger(__name__)
_WEIGHTS = "weights.safetensors"


class Journal:
    """The finished blocks of one stage of one run.

    Args:
        folder: where entries lie; made with the first.
        identity: what must be equal for a resume to continue the same work; JSON values.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))

    def finished(self, layers: Sequence[int]) -> list[int]:
        """The first of some layers, whose entries are whole; those after are removed. Raises ResumeError if they are
        another run's.
        """
        done: list[int] = []
        for layer in layers:
            entry = self._entry(layer)
            if not entry.is_dir():
                break
            try:
                verify_manifest(entry)
                refuse_other_run(entry, self._facts(entry)["identity"], self.identity)
            except CheckpointError as damage:
                log.warning("block %d is done again: %s", layer, damage)
                break
            done.append(layer)
        for path in self.folder.glob("step-*") if self.folder.is_dir() else ():
            if path.name not in {self._entry(layer).name for layer in done}:
                shutil.rmtree(path)
        return done

    def agreed(self, layers: Sequence[int], ranks: Ranks) -> set[int]:
        """`finished`, as the main one of several processes finds it."""
        done = list[int]()
        with ranks.failing_alike():
            if ranks.is_main:
                done = self.finished(layers)
        return set(ranks.agreed(done))

    def read(self, layer: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A finished block's weights by name, on the CPU, and what was noted of them."""
        entry = self._entry(layer)
        return load_file(self.weights(layer)), self._facts(entry)["facts"]

    def weights(self, layer: int) -> Path:
        """The safetensors file of a finished block's weights."""
        return self._entry(layer) / _WEIGHTS

    def write(self, layer: int, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Add a block. Raises ResourceError if the disk refuses."""
        with new_folder(self._entry(layer), force=True) as folder:
            save_file({name: weight.detach().cpu().contiguous() for name, weight in weights.items()}, folder / _WEIGHTS)
            write_json(folder / "facts.json", {"identity": self.identity, "facts": dict(facts)})
            write_manifest(folder)

    def _entry(self, layer: int) -> Path:
        return self.folder / f"step-{layer:06d}"

    def _facts(self, entry: Path) -> dict[str, Any]:
        return strict_json.loads((entry / "facts.json").read_bytes())
