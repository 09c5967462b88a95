"""The README.md of a checkpoint: what it is, where it comes from, what became smaller, how to open it."""

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, StrictUndefined

_TEMPLATE = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [compresso, pruned]
{%- if source and "/" in source %}
base_model: {{ source }}
{%- endif %}
---

# {{ source or "A language model" }}, pruned

This is {{ "`" ~ source ~ "`" if source else "a language model" }} made smaller by compresso (`pip install compresso-llm`)
{%- if recipe %} with the recipe `{{ recipe }}`{% endif %}.
Whole attention heads, FFN channels or layers were removed, so it is smaller on disk and faster on any hardware. What exactly was
done is in `recipe.yaml`, what was removed in `plan.json`, what it measured in `records.json`.
{% if rows %}
| | before | after | kept |
|---|---:|---:|---:|
{%- for name, before, after in rows %}
| {{ name }} | {{ "{:,}".format(before) }} | {{ "{:,}".format(after) }} | {{ "%.1f" % (100 * after / before) }} % |
{%- endfor %}
{% endif %}
## How to load it

```python
{%- if layout == "native" %}
import compresso  # knows this model type; without it, pass trust_remote_code=True: modeling_compresso.py lies beside the weights
{%- endif %}
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
{%- if layout == "padded" %}

Its layers are zero-padded to one width, so that any engine opens it; the padding costs memory and time.
{%- endif %}
{%- if prompt %}

## Prompt

It was trained to read a fixed text before every instruction (the collaborative prompt, version {{ prompt }}). The tokenizer's chat template
adds it; so does `compresso.load`. Without it the model works, and less well.
{%- endif %}

## Limits

Pruning keeps what its calibration data asked for. Measure the model on your own task before you rely on it; the terms of the original
model apply.
"""


def model_card(records: Mapping[str, Any]) -> str:
    """Markdown from a run's records; what they do not say is left out.

    Args:
        records: `model` (name of the original), `recipe` (name), `layout`, `prompt` (version of the collaborative prompt, or absent), and
            `before` / `after`, each with `parameters` (name -> count) and perhaps `macs_per_token`, `kv_bytes_per_token`, `bytes`.
    """
    before, after = records.get("before") or {}, records.get("after") or {}
    pairs = [(f"parameters, {name}", before.get("parameters", {}).get(name), count) for name, count in after.get("parameters", {}).items()]
    for key, name in (("macs_per_token", "MACs a token"), ("kv_bytes_per_token", "KV cache, bytes a token"), ("bytes", "bytes on disk")):
        pairs.append((name, before.get(key), after.get(key)))
    return (
        Environment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True)
        .from_string(_TEMPLATE)
        .render(
            source=records.get("model"),
            recipe=records.get("recipe"),
            layout=records.get("layout"),
            prompt=records.get("prompt"),
            rows=[(name, int(old), int(new)) for name, old, new in pairs if old and new is not None],
        )
    )
