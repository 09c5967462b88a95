"""README.md of packed weights: what the folder holds, what opens it, and what is not in it."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from compresso.checkpoint.kinds import auto_class
from compresso.checkpoint.overwrite import PACKED_MARK
from compresso.formats.config_text import config_text, older_obstacle, readers
from compresso.formats.packing import Packing
from compresso.native import per_layer_file

TESTED = "0.20.0"


def packed_card(packing: Packing, source: Path | None, model: PreTrainedModel, count: int) -> str:
    """README.md: what the folder holds, what opens it, and where the rest is told."""
    name = "" if source is None else " of `" + " ".join(source.resolve().name.replace("`", "'").split()) + "`"
    told = (
        "How it was made and what it can do stands in the README.md, recipe.yaml and records.json of the folder that it"
        " was exported from."
    )
    opens = auto_class(model.config).__name__
    file = per_layer_file(model.config.model_type)
    own = file and f"Layers differ, which {file.name} beside the weights computes: pass trust_remote_code=True to the"
    beside = f"{own} model's `from_pretrained`, or import compresso before.\n\n" if own else ""
    left_out = (
        f"Activations of {packing.simulated} bits, which it was trained for, are simulated by `compresso.load` of that"
        " folder and not in these files."
        if packing.simulated
        else ""
    )
    return f"""---
library_name: transformers
tags:
- compresso
- compressed-tensors
---

# Packed weights{name}

{count} linears that compresso {PACKED_MARK} compressed-tensors
({packing.format}): {packing.kind}. The values are those of the model that it was exported from. {told}
{left_out}

## How to load it

```bash
pip install transformers compressed-tensors=={TESTED}
```

```python
from transformers import {opens}, AutoTokenizer

model = {opens}.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

{beside}{_readers(packing, json.loads(config_text(model.config)))} Where it computes with full numbers, the file is
smaller; the model in memory and its speed are not.

## Limits

The licence and terms of the original model apply.
"""


def _readers(packing: Packing, config: dict[str, Any]) -> str:
    """What versions of transformers make of packed weights, as tried with 5.23 and 4.57.3."""
    if older_obstacle(config) is not None:
        return readers(config) + " It computes with full numbers."
    if not packing.symmetric:
        return "transformers 5 opens it and computes with full numbers; 4.57 does not unpack its zero points."
    if packing.inputs:
        return "transformers 5 opens it and computes with full numbers; 4.57 opens it and rounds activations."
    return readers(config) + " Both compute with full numbers."
