"""A run from a config alone: the same weights from the same seed, others from another; how it sees is said; a model of
text, and one that no stage trains, is refused as before.
"""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MobileViTConfig, ViTConfig

from compresso.checkpoint.load import load_model
from compresso.checkpoint.pixels import PROCESSOR, pixel_input, unsaid_colours
from compresso.checkpoint.source import open_source
from compresso.errors import CheckpointError
from compresso.native import PYRAMID_CLASSES
from compresso.runner.drawn import drawn
from compresso.runner.run import run

SIZES: dict[str, Any] = {
    "image_size": 32,
    "hidden_sizes": [16, 24, 32],
    "neck_hidden_sizes": [8, 8, 12, 16, 20, 24, 40],
}
TRAINED: dict[str, Any] = {"task": "segmentation", "stages": [{"finetune": {"steps": 2}}]}


def config(folder: Path, **fields: Any) -> Path:
    """A config.json without an architecture: the bare model."""
    made = PYRAMID_CLASSES["mobilevit"][0](**SIZES, **fields)
    folder.mkdir()
    (folder / "config.json").write_text(made.to_json_string())
    return folder / "config.json"


def weights(path: Path, seed: int) -> dict[str, torch.Tensor]:
    with drawn(str(path), TRAINED, None, seed, True) as name:
        assert Path(name).name == path.parent.name
        state: dict[str, torch.Tensor] = load_model(open_source(name)).state_dict()
    assert not Path(name).exists()
    return state


def test_the_seed_draws_the_weights(tmp_path: Path) -> None:
    path = config(tmp_path / "small")
    one, again, other = weights(path, 0), weights(path, 0), weights(path, 1)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_gains_of_batch_norms_begin_at_1_where_transformers_draws_them_around_0(tmp_path: Path) -> None:
    folder = tmp_path / "stock"
    folder.mkdir()
    (folder / "config.json").write_text(MobileViTConfig(**SIZES).to_json_string())
    drawn_ones = weights(folder / "config.json", 0)
    gains = [value for name, value in drawn_ones.items() if name.endswith("normalization.weight")]
    assert gains and all(bool((gain == 1).all()) for gain in gains)


def test_how_it_sees_is_said_or_what_lies_beside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = config(tmp_path / "small")
    with caplog.at_level(logging.WARNING), drawn(str(path), TRAINED, None, 3, False) as name:
        assert json.loads((Path(name) / PROCESSOR).read_text())["image_mean"] == [0.5, 0.5, 0.5]
    assert "weights are drawn by seed 3; no preprocessor_config.json lies beside it" in caplog.text
    (path.parent / PROCESSOR).write_text('{"do_normalize": false}')
    caplog.clear()
    with caplog.at_level(logging.WARNING), drawn(str(path), TRAINED, None, 3, False) as name:
        assert json.loads((Path(name) / PROCESSOR).read_text()) == {"do_normalize": False}
    assert "beside" not in caplog.text


def test_a_dry_run_sees_as_the_run_that_draws(tmp_path: Path) -> None:
    source = open_source(config(tmp_path / "small"), weights=False)
    assert pixel_input(source).mean == (0.5, 0.5, 0.5) and "colours from -1 to 1" in unsaid_colours(source)
    (tmp_path / "small" / PROCESSOR).write_text('{"do_normalize": false}')
    assert pixel_input(source).mean == (0.0,) and not unsaid_colours(source)


def test_what_no_stage_trains_first_and_what_reads_text_is_not_drawn(tmp_path: Path) -> None:
    text = tmp_path / "config.json"
    text.write_text(LlamaConfig().to_json_string())
    with drawn(str(text), {"stages": [{"magnitude": {}}]}, None, 0, True) as name:
        assert name == str(text)
    path = tmp_path / "vit.json"
    fields = json.loads(ViTConfig().to_json_string()) | {"architectures": ["ViTForImageClassification"]}
    path.write_text(json.dumps(fields))
    raw = {"task": "image-classification", "stages": [{"recover": {"steps": 1}}]}
    with drawn(str(path), raw, None, 0, True) as name:
        assert name == str(path)
    with pytest.raises(CheckpointError, match="has no weights; a run needs a folder"):
        run(raw, path, tmp_path / "none.parquet", output=tmp_path / "out", quiet=True)
