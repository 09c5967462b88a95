"""`compresso export --format compressed-tensors`: what a run rounded, packed and opened by plain transformers, or
refused in words.
"""

import functools
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.conftest import Call, reopen_here
from tests.runner.test_one_shot import GROUPS, SETS
from transformers import AutoModelForCausalLM

from compresso.checkpoint.source import open_source
from compresso.commands import export as exporting
from compresso.engines.parity import Format, Parity, Reference
from compresso.engines.transformers import PACKED, Transformers
from compresso.engines.transformers_process import NEW_TOKENS
from compresso.engines.verify import parities
from compresso.errors import ExportError
from compresso.runner.options import with_options
from compresso.runner.run import Result, run

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("compressed_tensors") is None, reason="compressed-tensors: not installed"
    ),
    pytest.mark.filterwarnings("ignore"),  # the library's own
]
ROUNDED = {
    "gptq/3": ["stages.gptq.symmetric=true", "stages.gptq.bits=4"],
    "awq/4-g128": [GROUPS],  # asymmetric
    "rtn/4-bit": ["stages.rtn.symmetric=true", "stages.rtn.group=16"],
    "smoothquant/w8a8": [],
}


Rounded = Callable[[str], Result]


@pytest.fixture(scope="module")
def rounded(tiny_folder: Path, instructions: Path, tmp_path_factory: pytest.TempPathFactory) -> Rounded:
    """rounded(recipe): what a run of it wrote, which tests share."""

    @functools.cache
    def once(recipe: str) -> Result:
        free = recipe.startswith("rtn")
        raw = with_options(recipe, model=str(tiny_folder), sets=ROUNDED[recipe] if free else [*SETS, *ROUNDED[recipe]])
        output = tmp_path_factory.mktemp("rounded") / "out"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("compresso.runner.output.reopen_and_compare", reopen_here)
            return run(
                raw, tiny_folder, None if free else instructions, output=output, quiet=True, allow_collapsed=True
            )

    return once


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["gptq/3", "awq/4-g128", "rtn/4-bit"])
def test_a_rounded_model_is_packed_and_computes_the_same(
    recipe: str, rounded: Rounded, tmp_path: Path, call: Call
) -> None:
    result = rounded(recipe)
    code, out, error = call(
        "export", result.folder, "--format", "compressed-tensors", "--output", tmp_path / "packed", "--json"
    )
    assert code == 0, error
    told = json.loads(out)
    assert (
        told["checked"] == "opened in transformers"
        and told["difference"] < 1e-4
        and told["dtype"].startswith("4 bits, ")
    )
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32).eval()
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(
            opened(input_ids=ids).logits, result.model.eval()(input_ids=ids).logits, atol=1e-4, rtol=1e-4
        )
    packed, dense = ((folder / "model.safetensors").stat().st_size for folder in (tmp_path / "packed", result.folder))
    assert packed < dense
    assert (
        json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["quant_method"]
        == "compressed-tensors"
    )


@pytest.mark.slow
def test_rounded_activations_go_with_the_weights(rounded: Rounded, tmp_path: Path, call: Call) -> None:
    result = rounded("smoothquant/w8a8")
    code, out, error = call(
        "export", result.folder, "--format", "compressed-tensors", "--output", tmp_path / "packed", "--json"
    )
    assert code == 0, error
    told = json.loads(out)
    assert told["dtype"] == "8 bits, a scale a row, activations of 8 bits" and 0 < told["difference"] < 0.1
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    (scheme,) = config["config_groups"].values()
    assert config["format"] == "int-quantized" and scheme["input_activations"]["dynamic"] is True
    assert scheme["input_activations"]["strategy"] == "token"


@pytest.mark.slow
def test_verify_says_what_becomes_of_a_rounded_model_and_of_another(
    rounded: Rounded, tiny_folder: Path, tmp_path: Path
) -> None:
    result = rounded("gptq/3")
    unused = Reference(torch.arange(3), torch.zeros(3, 5), torch.zeros(NEW_TOKENS))  # packed weights have their own
    (found,) = parities(Format.PACKED, [PACKED], open_source(result.folder), unused, tmp_path)
    assert (found.engine, found.opens, found.same_tokens) == ("compressed-tensors, packed", "yes", NEW_TOKENS)
    assert not (tmp_path / "compressed-tensors").exists()
    (found,) = parities(Format.PACKED, [PACKED], open_source(tiny_folder), unused, tmp_path)
    assert found.opens == "not checked" and "nothing in it was rounded by compresso" in found.reason


def test_what_cannot_be_packed_is_refused(rounded: Rounded, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ExportError,
        match=r"nothing in it was rounded by compresso, so there is nothing to pack; run one of awq, gptq, qat, rtn,"
        r" smoothquant, besa with bits, sparsegpt with bits on it first",
    ):
        exporting.export(tiny_folder, tmp_path / "packed", format="compressed-tensors")
    result = rounded("awq/4-g128")
    with pytest.raises(
        ExportError, match="dtype='q8_0': compressed-tensors files have the bits that the run rounded to"
    ):
        exporting.export(result.folder, tmp_path / "packed", format="compressed-tensors", dtype="q8_0")
    assert not (tmp_path / "packed").exists()


def test_a_folder_that_reads_back_differently_is_not_left(
    rounded: Rounded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = rounded("rtn/4-bit")
    monkeypatch.setattr(Transformers, "parity", lambda *_: Parity("transformers", "no", "logits differ by up to 3"))
    with pytest.raises(
        ExportError, match=r"packed would read back differently in transformers: logits differ by up to 3"
    ):
        exporting.export(result.folder, tmp_path / "packed", format="compressed-tensors")
    assert not list(tmp_path.glob("packed*"))
