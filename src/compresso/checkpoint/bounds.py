"""What a config may ask for, looked at before its class is built: its numbers cost memory and minutes, whether or not
they shape a tensor.

A config class writes a name for each label and a type for each layer, a model builds a module for each layer, and
counting walks over the units of each width. So each number that is a count has a most, far above what is published
(named beside it), and layers are compared with those that the weights hold.
"""

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import nn

from compresso.checkpoint.least import check_least
from compresso.errors import CheckpointError

_LAYERS = re.compile(r"(layers?|depths?|blocks|attention_types)$")
_NO_WIDTHS = re.compile(r"(window|block|chunk|image|batch|sample|cache|buffer).*size$|vocab")
_WIDTHS = re.compile(r"(size|dims?|widths?|embd|inner|hidden|heads?|channels|rank|d_model|d_ff)$")
MOST: tuple[tuple[str, re.Pattern[str], int], ...] = (
    ("layers", _LAYERS, 512),  # 126: Llama 3.1 405B
    ("labels", re.compile(r"^num_labels$"), 100_000),  # 21,843: ImageNet-21k
    ("experts", re.compile(r"experts?$"), 2**14),  # 16,384: Doge
    ("entries of a vocabulary", re.compile(r"vocab(_size)?$"), 2**24),  # 262,144: Gemma 3
    ("positions", re.compile(r"(positions?|position_embeddings)$"), 2**27),  # 10,485,760: Llama 4 Scout
    (
        "in a size that is no width",
        re.compile(r"(window|block|chunk|image|batch|sample|cache|buffer).*size$|vocab"),
        2**27,
    ),
    ("in a width", _WIDTHS, 2**18),  # 59,392: Falcon 180B
)
"""What a number counts, the names that it goes by (the first that fits decides), and the most."""
MOST_UNITS = 2**24
"""Of the widest width in all layers; 6.7 million: Llama 3.1 405B."""
MOST_IN_TABLE = 2**24
"""Numbers of a table of positions that a model computes in Python; 0.4 million: DistilBERT."""
_SLOW_TABLES = ("distilbert", "flaubert", "marian", "pegasus", "roformer", "xlm")
MOST_BUFFER_BYTES = 2**30
"""Of tables that lie in no file and are computed when a model is built; 100 MB: GPT-Neo 1.3B."""
_NUMBERED = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")
_CHECK = "Check the config."


def check_numbers(path: Path, data: dict[str, object]) -> None:
    """Raise CheckpointError if a number of a config, however deep, asks for more than is built, or for less than there
    can be.

    Args:
        path: the file that was read.
        data: what it holds.
    """
    for where, inside in _objects(data):
        for name, value in inside.items():
            check_least(path, f"{where}{name[:60]}", name, value, inside)
            for counted, names, most in MOST:
                if names.search(name):
                    if (found := _largest(value)) > most:
                        raise CheckpointError(
                            f"{path}: {where}{name[:60]} is {_written(found)}; at most {most:,} {counted} are built."
                            f" {_CHECK}"
                        )
                    break
        _check_together(path, where, inside)


def _check_together(path: Path, where: str, inside: dict[str, object]) -> None:
    """Raise CheckpointError if numbers that are fine alone ask for too much together."""
    layers = max((_largest(value) for name, value in inside.items() if _LAYERS.search(name)), default=0)
    widest = max(
        (name for name in inside if _kind(name) == "in a width"), key=lambda n: _largest(inside[n]), default=""
    )
    if widest and layers * _largest(inside[widest]) > MOST_UNITS:
        raise CheckpointError(
            f"{path}: {where}{widest[:60]} is {_written(_largest(inside[widest]))} in {_written(layers)} layers; at"
            f" most {MOST_UNITS:,} units are counted. {_CHECK}"
        )
    if inside.get("model_type") not in _SLOW_TABLES:
        return
    hidden = max(
        (_largest(inside[name]) for name in ("hidden_size", "n_embd", "d_model", "dim") if name in inside), default=1024
    )
    for name, value in inside.items():
        if _kind(name) == "positions" and _largest(value) * max(hidden, 1) > MOST_IN_TABLE:
            raise CheckpointError(
                f"{path}: {where}{name[:60]} is {_written(_largest(value))}, each with {_written(hidden)} numbers;"
                f" tables of at most {MOST_IN_TABLE:,} are built. {_CHECK}"
            )


def unshared_heads(data: dict[str, object]) -> str:
    """Why heads of queries cannot share those of keys and values in a config, however deep: a clause with its fields
    and values; "" if they can. Config classes do not look, and the model's tensors cannot be counted.
    """
    for where, inside in _objects(data):
        heads, shared = (inside.get(name) for name in ("num_attention_heads", "num_key_value_heads"))
        if "per_layer_config" in inside or str(inside.get("model_type")).startswith("compresso"):
            continue  # each layer has its own
        if isinstance(heads, int) and isinstance(shared, int) and heads > 0 < shared and heads % shared:
            return f"{where}num_attention_heads is {heads}, of which num_key_value_heads, {shared}, is no divisor"
    return ""


def check_layers(config_file: Path, layers: object, stored: Iterable[str]) -> None:
    """Raise CheckpointError if a config has more layers than weights are stored for.

    Args:
        config_file: the config.json, for the message.
        layers: its number of layers, as it has it.
        stored: names of the stored tensors.
    """
    found = [int(match[1]) for name in stored if (match := _NUMBERED.search(name))]
    if found and isinstance(layers, int) and layers > max(found) + 1:
        raise CheckpointError(
            f"{config_file}: num_hidden_layers is {layers:,}, and the weights beside it are of layers 0 to"
            f" {max(found)}. Correct the config, or fetch the model again."
        )


def check_tables(config_file: Path, model: nn.Module) -> None:
    """Raise CheckpointError if a model on the meta device would compute tables too large to hold beside its weights."""
    tables = {name: math.prod(table.shape) * table.element_size() for name, table in model.named_buffers()}
    if sum(tables.values()) > MOST_BUFFER_BYTES:
        largest = max(tables, key=lambda name: tables[name])
        raise CheckpointError(
            f"{config_file} asks for tables of {sum(tables.values()):,} bytes, the largest {largest}"
            f" {list(model.get_buffer(largest).shape)}; at most {MOST_BUFFER_BYTES:,} are built. {_CHECK}"
        )


def _kind(name: str) -> str:
    """What a number of this name counts; "" if nothing that is bounded."""
    return next((counted for counted, names, _ in MOST if names.search(name)), "")


def _objects(data: dict[str, object]) -> Iterator[tuple[str, dict[str, object]]]:
    """A JSON object and those inside it, each with the beginning of its fields' names; without recursion, as files
    choose how deep they are.
    """
    waiting: list[tuple[str, object]] = [("", data)]
    while waiting:
        where, value = waiting.pop()
        if isinstance(value, dict):
            yield where[-120:], value
            waiting += [(f"{where}{name}.", inner) for name, inner in value.items() if isinstance(inner, dict | list)]
        elif isinstance(value, list):
            waiting += [(where, inner) for inner in value if isinstance(inner, dict | list)]


def _largest(value: object) -> float:
    """The largest number in a value, or in the lists of it; 0 if there is none."""
    largest, waiting = 0.0, [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, list):
            waiting += one
        elif isinstance(one, int | float) and not isinstance(one, bool):
            largest = max(largest, one)
    return largest


def _written(number: float) -> str:
    """A number in few characters: files may hold thousands of digits."""
    return f"{number:,.0f}" if number < 1e15 else f"{float(min(number, 10**300)):.3g}"
