"""A teacher of distillation that is another model than the run's own: a folder with a segmenter or a classifier of
pictures.

It sees the pictures as its own preprocessor_config.json has it: the colours that the smaller model is given are led
back to 0..1 and brought to its mean, its deviation, its order of channels and its size; its logits are then compared as
those of any teacher, a segmenter's in the size of the label maps. Before anything is read it is checked that it has
weights, that it does the same task, and that it decides among the run's classes in the same order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel

from compresso.checkpoint.hub import is_hub_name
from compresso.checkpoint.kinds import auto_class, of_pictures, sees
from compresso.checkpoint.load import load_model, meta_model
from compresso.checkpoint.patched import stored_patches
from compresso.checkpoint.pixels import pixel_input
from compresso.checkpoint.source import Source, open_source
from compresso.core.picture import PixelInput
from compresso.edit.patches import patch_
from compresso.errors import RecipeError
from compresso.training.halves import Halves

OWN = ("live", "cached")
"""Words for the dense model of the run; any other is a folder."""


def open_teacher(teacher: str) -> Source:
    """A folder's model, checked, its weights not read. Raises RecipeError for a config alone, CheckpointError."""
    source = open_source(teacher)
    if not source.tensors:
        raise RecipeError(
            f"teacher={source.name} is a config alone, and random numbers teach nothing; train it first, as by"
            f" `compresso run segmenter/teacher --model {source.name}/config.json --data ... --output FOLDER`, and give"
            " that folder"
        )
    return source


def check_teacher(teacher: str, config: PreTrainedConfig) -> None:
    """Raise RecipeError for a teacher of a model with this config that is none, CheckpointError if it does not open."""
    if not of_pictures(config):
        raise RecipeError(
            f"teacher={teacher}: another model teaches models of pictures alone, and a {config.model_type} reads text;"
            f" give {' or '.join(OWN)}"
        )
    if not Path(teacher).expanduser().exists() and not ("/" in teacher and is_hub_name(teacher)):
        raise RecipeError(f"teacher={teacher} is no folder; give one with a model of pictures, or {' or '.join(OWN)}")
    source = open_teacher(teacher)
    if not of_pictures(source.config) or not sees(source.config):
        raise RecipeError(f"teacher={source.name} has no head for a task of pictures; give a model that a run wrote")
    if auto_class(source.config) is not auto_class(config) and sees(config):
        raise RecipeError(
            f"teacher={source.name} does another task than the model; give one with the same kind of head"
        )
    pixel_input(source)


def check_classes(teacher: str, labels: Sequence[str]) -> None:
    """Raise RecipeError for a teacher that decides among other classes than a run's, or in another order.

    Names that are numbers, or LABEL_ and a number, name nothing: then the number of classes has to be the same.
    """
    source = open_teacher(teacher)
    given = {int(number): str(name) for number, name in (source.config.id2label or {}).items()}
    theirs = [given.get(i, f"LABEL_{i}") for i in range(int(source.config.num_labels or 0))]
    if len(theirs) != len(labels):
        raise RecipeError(
            f"teacher={source.name} decides among {len(theirs)} classes, this run among {len(labels)}; train it on the"
            " same data, or give another"
        )
    if any(map(_says_nothing, theirs)) or any(map(_says_nothing, labels)):
        return
    odd = next((i for i, (one, other) in enumerate(zip(theirs, labels, strict=True)) if one != other), None)
    if odd is not None:
        raise RecipeError(
            f"teacher={source.name} calls class {odd} {theirs[odd]!r}, this run {labels[odd]!r}; train it on the same"
            " data, or give another"
        )


def _says_nothing(name: str) -> bool:
    """Whether a name of a class is but its number."""
    return name.removeprefix("LABEL_").isdecimal()


def how_it_sees(teacher: str) -> PixelInput:
    """How a folder's model sees pictures. Raises CheckpointError."""
    return pixel_input(open_teacher(teacher))


def shaped_teacher(teacher: str) -> PreTrainedModel:
    """Its modules on the meta device. Raises CheckpointError."""
    return meta_model(open_teacher(teacher))


def read_teacher(teacher: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The teacher as `compresso.load` opens it, frozen. Raises CheckpointError, NumericError, ResourceError as
    `load_model`, ArchError for an unknown forward patch.
    """
    source = open_teacher(teacher)
    model = load_model(source, dtype=dtype, device=device)
    patch_(model, stored_patches(source))
    return model.requires_grad_(False).eval()


@dataclass(frozen=True)
class Sees:
    """Halves of a model that is given pictures as another one sees them.

    Args:
        halves: of the model.
        given: how the other one sees.
        own: how this one does.
    """

    halves: Halves
    given: PixelInput
    own: PixelInput

    def read(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """As the halves read it."""
        return self.halves.read({**batch, "pixel_values": recoloured(batch["pixel_values"], self.given, self.own)})

    def logits(self, last: Tensor) -> Tensor:
        """Theirs."""
        return self.halves.logits(last)

    def parameters(self) -> Sequence[Tensor]:
        """Theirs."""
        return self.halves.parameters()

    def check(self) -> None:
        """As they do."""
        self.halves.check()

    @property
    def reads_states(self) -> bool:
        """As theirs."""
        return self.halves.reads_states

    @property
    def outcomes(self) -> int:
        """Theirs."""
        return self.halves.outcomes

    @property
    def words(self) -> str:
        """Theirs."""
        return self.halves.words


def recoloured(values: Tensor, given: PixelInput, own: PixelInput) -> Tensor:
    """Pixel values [n, channels, height, width] of one model as another sees the same pictures, in its size."""
    shaped = lambda numbers: torch.tensor(numbers, dtype=values.dtype, device=values.device).reshape(-1, 1, 1)  # noqa: E731
    plain = values.flip(1) if given.bgr else values
    plain = plain * shaped(given.std) + shaped(given.mean)
    if plain.shape[-2:] != (own.height, own.width):
        plain = functional.interpolate(plain, (own.height, own.width), mode="bilinear", antialias=True)
    seen = (plain - shaped(own.mean)) / shaped(own.std)
    return seen.flip(1) if own.bgr else seen
