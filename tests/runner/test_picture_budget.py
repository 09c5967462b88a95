"""Budgets of time and memory of models of pictures: the largest share whose counted network is within the table's
limits, floors and dense models in a line, tables of others refused; one table measured, and a plan by it.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MobileViTConfig, PreTrainedConfig, PreTrainedModel, SegformerConfig

from compresso.arch.base import arch_for
from compresso.checkpoint.kinds import from_config
from compresso.commands.latency import latency
from compresso.commands.plan import plan
from compresso.core.picture_table import PictureTable, Width
from compresso.errors import ArchError, BudgetError, ExportError
from compresso.formats.hf import save_checkpoint
from compresso.formats.plain import check_plain
from compresso.native import PYRAMID_CLASSES
from compresso.runner import picture_latency
from compresso.runner.picture_budget import limits_of, memory_bytes, with_picture_budget
from compresso.wording import in_python

WIDTHS = (Width(1.0, 100.0, 40.0, 9e8), Width(0.5, 30.0, 20.0, 7e8), Width(0.25, 10.0, 16.0, 6e8))
RAW: dict[str, Any] = {"task": "segmentation", "stages": [{"filter_pruning": {}}]}


def table(widths: tuple[Width, ...] = WIDTHS) -> PictureTable:
    return PictureTable({"model_type": "mobilevit"}, {"device": "cpu", "threads": 1}, "float32", widths)


def test_time_and_memory_are_read_off_lines_between_what_was_measured() -> None:
    made = table()
    assert [one.macs for one in made.widths] == [10.0, 30.0, 100.0]
    assert made.of("milliseconds", 65.0) == pytest.approx(30.0) and made.of("bytes", 20.0) == pytest.approx(6.5e8)
    assert made.of("milliseconds", 1.0) == 16.0 and made.of("milliseconds", 1e9) == 40.0


def test_noise_that_lets_a_wider_network_cost_less_is_levelled() -> None:
    made = table((Width(1.0, 100.0, 40.0, 9e8), Width(0.5, 30.0, 10.0, 7e8), Width(0.25, 10.0, 16.0, 6e8)))
    assert [one.milliseconds for one in made.widths] == [13.0, 13.0, 40.0]


def test_it_reads_what_it_wrote_and_nothing_else() -> None:
    assert PictureTable.from_json(table().to_json()) == table()
    for text in ('{"kind": "latency", "format": 1}', "[]", '{"kind": "pictures", "format": 1}'):
        with pytest.raises(ValueError, match="not a table of a model of pictures"):
            PictureTable.from_json(text)
    with pytest.raises(ValueError, match="at least two networks"):
        table(WIDTHS[:1])


def macs(raw: Mapping[str, Any]) -> float:
    """Counted as the square of the share."""
    return 100 * raw["stages"][0]["filter_pruning"]["keep"] ** 2


@pytest.mark.parametrize(
    ("limits", "keep"),
    [({"milliseconds": 30.0}, 0.80), ({"bytes": 7e8}, 0.54), ({"milliseconds": 30.0, "bytes": 7e8}, 0.54)],
)
def test_the_largest_share_within_all_limits_is_kept(limits: Any, keep: float) -> None:
    """By hand: 30 ms is 65 of 100, whose root is .806; 700 MB is 30, whose root is .547."""
    made = with_picture_budget(RAW, table(), limits, "--asked", macs)
    assert made["stages"][0]["filter_pruning"]["keep"] == keep


def test_a_share_that_no_config_holds_is_passed_over() -> None:
    def only_fives(raw: Mapping[str, Any]) -> float:
        if round(100 * raw["stages"][0]["filter_pruning"]["keep"]) % 5:
            raise ExportError("no field for it")
        return macs(raw)

    made = with_picture_budget(RAW, table(), {"bytes": 7e8}, "--asked", only_fives)
    assert made["stages"][0]["filter_pruning"]["keep"] == 0.5


def test_a_share_so_small_that_nothing_stays_is_passed_over() -> None:
    def from_sixty(raw: Mapping[str, Any]) -> float:
        if raw["stages"][0]["filter_pruning"]["keep"] < 0.6:
            raise BudgetError("a floor")
        return macs(raw)

    made = with_picture_budget(RAW, table(), {"milliseconds": 30.0}, "--asked", from_sixty)
    assert made["stages"][0]["filter_pruning"]["keep"] == 0.8
    with pytest.raises(BudgetError, match="the recipe leaves nothing so small"):
        with_picture_budget(RAW, table(), {"bytes": 7e8}, "--asked", from_sixty)


def test_floors_and_a_dense_model_that_fits_are_said() -> None:
    with pytest.raises(
        BudgetError, match=r"--milliseconds 9: the smallest network .* 25% .* takes 16 ms; give no less"
    ):
        with_picture_budget(RAW, table(), {"milliseconds": 9.0}, "--milliseconds 9", macs)
    with pytest.raises(BudgetError, match=r"takes 0.6 GB; give no less"):
        with_picture_budget(RAW, table(), {"bytes": 5e8}, "--memory 500MB", macs)
    with pytest.raises(BudgetError, match=r"the dense model takes 40 ms and 0.9 GB already"):
        with_picture_budget(RAW, table(), {"milliseconds": 50.0, "bytes": 3.7e9}, "--asked", macs)
    held = with_picture_budget(RAW, table(), {"milliseconds": 30.0, "bytes": 3.7e9}, "--asked", macs)
    assert held["stages"][0]["filter_pruning"]["keep"] == 0.8


def test_sizes_are_read() -> None:
    assert [memory_bytes(text) for text in ("3.7GB", "500M", "12", "64 kB")] == [3.7e9, 5e8, 12, 64e3]
    for text in ("", "3.7 apples", "-1GB", "0"):
        with pytest.raises(BudgetError, match=r"wanted a positive number of bytes, such as 3.7GB"):
            memory_bytes(text)
    with pytest.raises(BudgetError, match="wanted a positive number of milliseconds a picture"):
        limits_of(float("nan"), None)
    assert in_python("--memory 3.7GB, or --memory") == "memory='3.7GB', or memory=True"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes: dict[str, Any] = {"image_size": 32, "hidden_sizes": [16, 24, 32]}
    made = PYRAMID_CLASSES["mobilevit"][0](**sizes, neck_hidden_sizes=[8, 16, 32, 32, 40, 48, 64])
    folder = tmp_path_factory.mktemp("models") / "small"
    folder.mkdir()
    (folder / "config.json").write_text(made.to_json_string())
    return folder / "config.json"


def test_what_a_budget_of_pictures_needs_is_said(model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        BudgetError, match=r"memory='3.7GB' of a model of pictures is measured and needs latency_table="
    ):
        plan("segmenter", model, memory="3.7GB")
    with pytest.raises(BudgetError, match=r"memory='3.7GB' and keep= are two budgets; the first goes with milli"):
        plan("segmenter", model, memory="3.7GB", keep=0.5)
    with pytest.raises(BudgetError, match="speedup='2x': give milliseconds="):
        plan("segmenter", model, speedup="2x")
    (tmp_path / "config.json").write_text(LlamaConfig().to_json_string())
    with pytest.raises(BudgetError, match="is a budget of models of pictures, and a llama reads text"):
        plan("gate-taylor", tmp_path / "config.json", memory="3.7GB")


@pytest.mark.slow
def test_a_table_is_measured_and_a_plan_meets_it(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    made = latency(model, levels=2, rounds=1, device="cpu", output=path, quiet=True)
    assert isinstance(made, PictureTable) and PictureTable.from_json(path.read_text()) == made
    small, whole = made.widths
    assert small.macs < whole.macs and small.share == 0.5 and 1e7 < small.bytes <= whole.bytes
    told = json.loads(path.read_text())
    given = {0.5: (10.0, 5e8), 1.0: (20.0, 6e8)}
    for one in told["widths"]:
        one["milliseconds"], one["bytes"] = given[one["share"]]  # so that nothing here depends on this machine's times
    path.write_text(json.dumps(told))
    facts = plan("segmenter", model, milliseconds=15.0, memory="3.7GB", latency_table=path)
    half = (small.macs + whole.macs) / 2
    assert 0.8 * half < facts["after"]["macs_per_token"] <= half
    (note,) = [one for one in facts["notes"] if one.startswith("a picture by the table: 20 ms -> 1")]
    assert "peak memory 0.6 GB -> 0.5" in note
    with pytest.raises(BudgetError, match=r"milliseconds=5.*takes 10 ms; give no less than that"):
        plan("segmenter", model, milliseconds=5.0, latency_table=path)
    for floor, quantity in ((17.4456, "milliseconds"), (435_470_336.0, "bytes")):
        told["widths"][0][quantity] = floor
        path.write_text(json.dumps(told))
        budget: dict[str, Any] = {"milliseconds": 1.0} if quantity == "milliseconds" else {"memory": "1"}
        with pytest.raises(BudgetError, match="give no less than that") as refused:
            plan("segmenter", model, **budget, latency_table=path)
        (named,) = re.findall(r"takes ([\d.]+) (?:ms|GB); give", str(refused.value))
        followed = {"milliseconds": float(named)} if quantity == "milliseconds" else {"memory": f"{named}GB"}
        plan("segmenter", model, **followed, latency_table=path)  # what is named is enough
    told["model"]["block_parameters"] += 1
    path.write_text(json.dumps(told))
    with pytest.raises(BudgetError, match="is of another model: block_parameters is"):
        plan("segmenter", model, milliseconds=15.0, latency_table=path)


CLASSES = ["MobileViTForSemanticSegmentation"]
SMALL: dict[str, Any] = {"image_size": 32, "num_labels": 3, "hidden_sizes": [16, 24, 32]}
SMALL |= {"neck_hidden_sizes": [8, 16, 32, 32, 40, 48, 64], "aspp_out_channels": 16, "architectures": CLASSES}
SEEN: dict[str, Any] = {"image_size": 64, "num_labels": 3, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
SEEN |= {"decoder_hidden_size": 32, "num_attention_heads": [1, 2, 3, 4]}
HEADED = {
    "mobilevit": MobileViTConfig(**SMALL),
    "pyramid": PYRAMID_CLASSES["mobilevit"][0](
        **{**SMALL, "architectures": [PYRAMID_CLASSES["mobilevit"][2].__name__]}
    ),
    "segformer": SegformerConfig(**SEEN, architectures=["SegformerForSemanticSegmentation"]),
}


@pytest.mark.parametrize("config", HEADED.values(), ids=HEADED.keys())
def test_each_network_of_a_headed_config_is_what_a_plan_leaves_and_can_be_written(
    config: PreTrainedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One network's widths are never those of another: each has a config of its own."""

    def memory(model: PreTrainedModel) -> SimpleNamespace:
        save_checkpoint(model, arch_for(model.config).shapes(model), tmp_path / f"{len(list(tmp_path.iterdir()))}")
        return SimpleNamespace(value=1e9)

    (tmp_path / "config.json").write_text(config.to_json_string())
    monkeypatch.setattr(picture_latency, "picture_memory", memory)
    made = latency(tmp_path / "config.json", levels=3, rounds=1, device="cpu", quiet=True)
    assert isinstance(made, PictureTable) and made.widths[-1].share == 1 and len(made.widths) >= 2
    for one in made.widths[:-1]:
        counted = plan("segmenter", tmp_path / "config.json", keep=one.share)["after"]["macs_per_token"]
        assert one.macs == counted < made.widths[-1].macs


def test_a_model_of_a_config_leaves_it_as_it_was() -> None:
    for config in HEADED.values():
        told = config.to_dict()
        made = from_config(config, dtype=torch.bfloat16)
        made.config.num_labels, made.config.hidden_sizes[0] = 7, 8
        assert config.to_dict() == told


def test_what_no_config_of_pictures_holds_is_told_no_recipe_of_texts() -> None:
    model = from_config(HEADED["mobilevit"])
    model.config.expand_ratio *= 2
    with pytest.raises(ExportError, match=r"one ratio for the channels of all its stages, .* recipe segmenter") as said:
        check_plain(model, (), "auto")
    assert "shortgpt" not in str(said.value) and "heads" not in str(said.value)


def test_a_config_that_holds_one_width_alone_is_said(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = picture_latency._writable  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(picture_latency, "_writable", lambda source, task, _: whole(source, task, 100))
    with pytest.raises(ArchError, match="its config holds no two of 3 widths; give a model with more channels"):
        latency(model, levels=3, rounds=1, quiet=True)
