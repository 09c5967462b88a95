"""How many entries the lists of a picture model's config must have: its class reads them by number, and one too few
fails there without a name, one too many makes a head for a width that no stage has.

A height and a width, where one number is not both, are two. A MobileViT has three stages of transformers and seven
widths of convolutions, whatever its config says. The others have as many stages as a field says, or the list of their
depths. SegFormer's lists are looked at in `checkpoint/stages.py`.
"""

from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedConfig

from compresso.errors import CheckpointError, quoted

_SIDES: dict[str, int | str] = {"image_size": 2, "patch_size": 2}
_MOBILEVIT: dict[str, int | str] = {"image_size": 2, "patch_size": 0, "hidden_sizes": 3, "neck_hidden_sizes": 7}
_SWIN: dict[str, int | str] = _SIDES | {"num_heads": "depths"}
_CONVNEXT: dict[str, int | str] = dict.fromkeys(("depths", "hidden_sizes"), "num_stages")
ENTRIES: Mapping[str, Mapping[str, int | str]] = {
    "vit": _SIDES,
    "deit": _SIDES,
    "mobilevit": _MOBILEVIT,
    "compresso_mobilevit_pyramid": _MOBILEVIT,
    "swin": _SWIN,
    "swinv2": _SWIN | {"pretrained_window_sizes": "depths"},
    "convnext": _CONVNEXT,
    "convnextv2": _CONVNEXT,
}
"""Model type -> list -> its entries: a number, or the field that is one or has as many; 0 for what is no list."""


def check_entries(path: Path, config: PreTrainedConfig) -> None:
    """Raise CheckpointError if a list has fewer entries than the config's class reads, or more.

    Args:
        path: the file that was read.
        config: made of it, with the lists that its class has by default; those inside it are looked at, too.
    """
    within = {f"{name}.": one for name, one in vars(config).items() if isinstance(one, PreTrainedConfig)}
    for where, own in {"": config, **within}.items():
        for name, wanted in ENTRIES.get(own.model_type, {}).items():
            value, beside = getattr(own, name, None), getattr(own, wanted, None) if isinstance(wanted, str) else wanted
            n = len(beside) if isinstance(beside, list | tuple) else beside
            if not isinstance(value, list | tuple) or not isinstance(n, int) or (wanted != 0 and len(value) == n):
                continue
            entries = "1 entry" if n == 1 else f"{n:,} entries" if n else "a number"
            as_many = f", as many as {where}{wanted} {'says' if beside is n else 'has'}" if wanted != n else ""
            raise CheckpointError(
                f"{path}: {where}{name} is {quoted(list(value), 120)}; wanted {entries}{as_many}. Check the config."
            )
