"""What lies beside the weights of a model with forward patches: their tensors, and a class file that puts them on."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from compresso.checkpoint.atomic import write_text
from compresso.checkpoint.folder import read_json
from compresso.edit.patch import Patch
from compresso.edit.patches import save_tensors
from compresso.native import PATCHED_CLASS, PATCHED_FILE


def save_patches(patches: Sequence[Patch], folder: Path) -> None:
    """Write what patches compute with into the folder of a checkpoint, which `compresso.load` reads.

    The config of a stock causal language model names the class file, too: with trust_remote_code=True transformers
    opens the model patched, and without it as its weights alone say. One whose class is ours, per layer, is opened
    patched by `compresso.load` alone. Without patches nothing is written.
    """
    save_tensors(patches, folder)
    config = read_json(folder / "config.json") if patches else {}
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if config and "auto_map" not in config and known & set(config.get("architectures") or ()):
        shutil.copyfile(PATCHED_FILE, folder / PATCHED_FILE.name)
        named = {**config, "auto_map": {"AutoModelForCausalLM": f"{PATCHED_FILE.stem}.{PATCHED_CLASS.__name__}"}}
        write_text(folder / "config.json", json.dumps(named, indent=2, sort_keys=True) + "\n")
