"""How a model sees pictures is what its preprocessor_config.json says, computed by hand; what nobody does here is
refused in one line.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ViTConfig, ViTModel

from compresso.checkpoint.pixels import pixel_input
from compresso.checkpoint.source import Source, open_source
from compresso.errors import CheckpointError

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=8)).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def saying(folder: Path, fields: dict[str, Any], name: str = "preprocessor_config.json") -> Source:
    (folder / name).write_text(json.dumps(fields))
    return open_source(folder)


def test_colours_are_scaled_and_shifted_as_the_file_says(vit: Path) -> None:
    fields = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.5], "do_normalize": True}
    seen = pixel_input(saying(vit, fields))
    assert (seen.height, seen.width) == (16, 16)
    found = seen(torch.tensor([51, 255, 0], dtype=torch.uint8).reshape(3, 1, 1)).flatten()
    assert found.tolist() == pytest.approx([(0.2 - 0.4) / 0.2, (1 - 0.5) / 0.25, (0 - 0.6) / 0.5], abs=1e-6)


@pytest.mark.parametrize("name", ["do_reduce_labels", "reduce_labels"])
def test_maps_may_begin_at_one(vit: Path, name: str) -> None:
    assert pixel_input(saying(vit, {name: True})).reduced
    assert not pixel_input(saying(vit, {name: False})).reduced and not pixel_input(saying(vit, {})).reduced


def test_a_model_may_see_blue_first_and_no_shift(vit: Path) -> None:
    fields = {"image_processor": {"do_normalize": False, "do_flip_channel_order": True}}
    seen = pixel_input(saying(vit, fields, "processor_config.json"))
    assert seen(torch.tensor([255, 51, 0], dtype=torch.uint8).reshape(3, 1, 1)).flatten().tolist() == pytest.approx(
        [0.0, 0.2, 1.0]
    )


@pytest.mark.parametrize(
    "fields,said",
    [
        ({"do_rescale": False}, "colours are not scaled by 1/255"),
        ({"rescale_factor": 1 / 127.5}, "colours are not scaled by 1/255"),
        ({"image_mean": [0.5], "image_std": [0.5] * 3}, r"image_mean is \[0.5\]; wanted three numbers"),
        ({"image_mean": [0.5] * 3, "image_std": [0.5, 0, 0.5]}, "image_std is .*; wanted three numbers"),
    ],
)
def test_what_nobody_does_here_is_refused(vit: Path, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        pixel_input(saying(vit, fields))


def test_a_size_that_patches_do_not_divide_is_refused(tmp_path: Path) -> None:
    ViTModel(ViTConfig(**SIZES, image_size=18, patch_size=8)).save_pretrained(tmp_path / "odd")
    with pytest.raises(CheckpointError, match=r"odd: image_size 18 x 18 is no multiple of patch_size 8"):
        pixel_input(open_source(tmp_path / "odd"))


def test_a_folder_that_does_not_say_is_refused_with_the_cure(vit: Path) -> None:
    with pytest.raises(CheckpointError, match=r"vit has no preprocessor_config.json.*add that of the model"):
        pixel_input(open_source(vit))
