"""A bank on disk: what it was made of, and of each layer the orders, the errors and, where asked for, second moments.

    bank/
      bank.json             identity and number of layers, written first
      step-000003/          layer 3, whole or absent: orders and errors (and moments) as tensors, facts, manifest

A folder without an entry for each layer is a bank that is not finished; building it again goes on.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor

from compresso.checkpoint.atomic import verify_manifest, write_json
from compresso.checkpoint.identity import differences
from compresso.core import strict_json
from compresso.core.axis import Kind
from compresso.errors import CheckpointError
from compresso.solve.bank import Bank, Ladder, SubLayer
from compresso.sweep.journal import Journal
from compresso.training.ranks import ALONE, Ranks

FORMAT = 1
_NAME = "bank.json"


def begin(folder: Path, identity: Mapping[str, Any], layers: int, ranks: Ranks = ALONE) -> Journal:
    """The journal of a bank's layers, in a folder that is new or holds a part of the same bank.

    Args:
        folder: of the bank.
        identity: what it is made of.
        layers: of the model.
        ranks: processes, of which the main one writes.

    Raises:
        CheckpointError: it holds another bank, or something else by that name.
    """
    with ranks.failing_alike():
        if ranks.is_main and (folder / _NAME).exists():
            _refuse_other(folder, _told(folder)["identity"], identity)
        elif ranks.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / _NAME, {"format": FORMAT, "layers": layers, "identity": dict(identity)})
    return Journal(folder, identity)


def packed(sub_layer: SubLayer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A sub-layer as tensors and facts."""
    name = str(sub_layer.kind)
    tensors = {f"{name}.queries": torch.tensor(sub_layer.queries, dtype=torch.int64)} if sub_layer.queries else {}
    for ladder in sub_layer.ladders:
        tensors[f"{name}.order.{ladder.slots}"] = torch.tensor(ladder.order, dtype=torch.int64)
        tensors[f"{name}.errors.{ladder.slots}"] = torch.tensor(ladder.errors, dtype=torch.float64)
    facts = {
        "consumer": sub_layer.consumer,
        "units": sub_layer.units,
        "width": sub_layer.width,
        "slots": sub_layer.slots,
        "fewest": sub_layer.fewest,
        "ladders": [ladder.slots for ladder in sub_layer.ladders],
        "gone": sub_layer.gone,
        "damping": sub_layer.damping,
    }
    return tensors, facts


def read(folder: Path, identity: Mapping[str, Any] | None = None) -> Bank:
    """A finished bank.

    Args:
        folder: of it.
        identity: what it has to be made of; None takes it as it is.

    Raises:
        CheckpointError: it is none, damaged, not finished, or made of something else, whose differing fields are named.
    """
    told = _told(folder)
    if identity is not None:
        _refuse_other(folder, told["identity"], identity)
    journal = Journal(folder, told["identity"])
    sub_layers, blocks = dict[str, SubLayer](), dict[int, float]()
    for layer in range(told["layers"]):
        path = journal.weights(layer)
        if not path.is_file():
            raise CheckpointError(
                f"bank {folder} is not finished: layer {layer} of {told['layers']} is missing. Build it again: it goes"
                " on from there"
            )
        verify_manifest(path.parent)
        facts = strict_json.loads((path.parent / "facts.json").read_bytes())
        _refuse_other(path.parent, facts["identity"], told["identity"])
        facts = facts["facts"]
        if facts["block"] is not None:
            blocks[layer] = facts["block"]
        for kind in (Kind.ATTENTION, Kind.MLP):
            if kind in facts["sub_layers"]:
                one = _unpacked(layer, kind, facts["sub_layers"][kind], path)
                sub_layers[one.name] = one
    return Bank(told["identity"], told["layers"], sub_layers, blocks)


def read_moment(folder: Path, sub_layer: SubLayer) -> Tensor:
    """The second moment [in, in] of what a sub-layer's consumer read, float32. Raises CheckpointError if the bank has
    kept none.
    """
    path, name = Journal(folder, {}).weights(sub_layer.layer), f"{sub_layer.kind}.moment"
    with safe_open(path, "pt") as file:
        if name not in file.keys():  # noqa: SIM118  not a mapping
            raise CheckpointError(f"bank {folder} has no second moments; build it with moments: true, or give one")
        return cast(Tensor, file.get_tensor(name))


def _unpacked(layer: int, kind: Kind, facts: Mapping[str, Any], path: Path) -> SubLayer:
    """A sub-layer from its facts and the tensors in a file."""
    with safe_open(path, "pt") as file:

        def values(name: str) -> Any:
            return file.get_tensor(f"{kind}.{name}").tolist()

        ladders = [
            Ladder(slots, tuple(values(f"order.{slots}")), tuple(values(f"errors.{slots}")))
            for slots in facts["ladders"]
        ]
        queries = tuple(map(tuple, values("queries"))) if ladders and facts["slots"] > 1 else ()
    plain = {name: facts[name] for name in ("consumer", "units", "width", "slots", "fewest", "gone", "damping")}
    return SubLayer(layer=layer, kind=kind, ladders=tuple(ladders), queries=queries, **plain)


def _told(folder: Path) -> dict[str, Any]:
    """What `bank.json` says. Raises CheckpointError."""
    path = folder / _NAME
    try:
        told = strict_json.loads(path.read_bytes())
        if told["format"] != FORMAT or not isinstance(told["layers"], int) or not isinstance(told["identity"], dict):
            raise ValueError(f"its format is {told['format']!r}, and this release reads {FORMAT}")
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no bank: there is no {_NAME} in it; give the folder of one") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no bank's: {error}; build the bank again") from error
    return told


def _refuse_other(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise CheckpointError naming what differs between two identities."""
    if differing := differences(found, wanted):
        raise CheckpointError(
            f"{path} is the bank of another model, calibration or kind: {'; '.join(differing)}. Give what it was made "
            "of, or build another in another folder"
        )
