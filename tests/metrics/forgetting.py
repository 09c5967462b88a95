"""A checkpoint whose context learned gates prune, as a run writes it."""

import json
import shutil
from pathlib import Path

from compresso.checkpoint.load import load_model
from compresso.checkpoint.source import open_source
from compresso.edit.context_gates import ContextGates
from compresso.edit.patches import save_tensors, written


def gated_folder(plain: Path, folder: Path) -> Path:
    """A copy of a plain checkpoint with random gates beside it, that drop some of the tokens a query sees."""
    shutil.copytree(plain, folder)
    patch = ContextGates(load_model(open_source(plain)), 8, 0.9, seed=1).patch()
    save_tensors([patch], folder)
    (folder / "records.json").write_text(json.dumps({"patches": written([patch])}))
    return folder
