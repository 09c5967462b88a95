"""A list of a picture model's config with fewer entries than its class reads, or more, is refused by name, value and
what is wanted before anything is built of it.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    CONFIG_MAPPING,
    ConvNextConfig,
    DeiTConfig,
    MobileViTConfig,
    PreTrainedConfig,
    Swinv2Config,
    UperNetConfig,
    ViTConfig,
)

from compresso.checkpoint.lists import ENTRIES, check_entries
from compresso.checkpoint.source import open_source
from compresso.errors import CheckpointError
from compresso.runner.inspection import inspect
from tests.tasks.scenes import NARROW


def written(config: PreTrainedConfig, folder: Path, **fields: Any) -> Path:
    config.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return path


def refused(path: Path, words: str) -> None:
    for command in (open_source, inspect):
        with pytest.raises(CheckpointError) as raised:
            command(path)
        assert f"{path}: {words} Check the config." in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("hidden_sizes", [144, 192], "3 entries"),
        ("hidden_sizes", [144, 192, 240, 288], "3 entries"),
        ("neck_hidden_sizes", [8, 8, 12, 16, 20, 24], "7 entries"),
        ("image_size", [32], "2 entries"),
        ("patch_size", [2, 2], "a number"),
        ("patch_size", [], "a number"),
    ],
)
def test_a_mobilevit_has_three_stages_of_transformers(
    field: str, value: list[int], wanted: str, tmp_path: Path
) -> None:
    refused(written(MobileViTConfig(**NARROW), tmp_path, **{field: value}), f"{field} is {value}; wanted {wanted}.")


@pytest.mark.parametrize("config", [ViTConfig, DeiTConfig])
@pytest.mark.parametrize("value", [[], [32], [32, 32, 32]])
def test_sides_are_a_height_and_a_width(config: type[PreTrainedConfig], value: list[int], tmp_path: Path) -> None:
    refused(written(config(), tmp_path, image_size=value), f"image_size is {value}; wanted 2 entries.")
    assert open_source(written(config(), tmp_path, image_size=[32, 48])).config.image_size == [32, 48]


def test_lists_of_a_backbone_are_named_with_where_they_lie(tmp_path: Path) -> None:
    backbone = Swinv2Config(depths=[1, 1], num_heads=[2, 4], out_features=["stage1", "stage2"]).to_dict()
    path = written(UperNetConfig(), tmp_path, backbone_config=backbone | {"num_heads": [2]})
    said = "backbone_config.num_heads is [2]; wanted 2 entries, as many as backbone_config.depths has."
    with pytest.raises(CheckpointError) as raised:
        open_source(path)
    assert f"{path}: {said} Check the config." in str(raised.value)


@pytest.mark.parametrize("config", [MobileViTConfig, Swinv2Config, ConvNextConfig, UperNetConfig])
def test_what_a_class_writes_by_itself_is_whole(config: type[PreTrainedConfig]) -> None:
    check_entries(Path("config.json"), config())


def test_fields_are_those_of_the_classes() -> None:
    for kind, lists in ENTRIES.items():
        own = CONFIG_MAPPING[kind]()
        for name, wanted in lists.items():
            assert isinstance(getattr(own, name), list | tuple) or wanted in (0, 2), (kind, name)
            assert isinstance(wanted, int) or hasattr(own, wanted), (kind, wanted)
