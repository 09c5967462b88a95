"""What `compresso inspect` shows by name it explains by that name, and what no run removes is not offered."""

from pathlib import Path

import pytest
from tests.conftest import Call
from tests.tasks.conftest import SIZES
from transformers import BertConfig, LlamaConfig, PreTrainedConfig

from compresso.errors import ArchError
from compresso.runner.inspection import inspect

SMALL = {key: value for key, value in SIZES.items() if key != "vocab_size"} | {"vocab_size": 40}


@pytest.fixture(params=["bert", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A config of an encoder or a decoder."""
    made: dict[str, tuple[type[PreTrainedConfig], str]] = {
        "bert": (BertConfig, "BertForSequenceClassification"),
        "llama": (LlamaConfig, "LlamaForCausalLM"),
    }
    kind, architecture = made[request.param]
    kind(**SMALL, architectures=[architecture]).save_pretrained(tmp_path)  # pyright: ignore[reportArgumentType]
    return tmp_path


def test_every_kind_that_is_shown_is_explained(folder: Path) -> None:
    for row in inspect(folder)["axes"]:
        said = inspect(folder, row["kind"])["explained"]
        assert said["kind"] == row["kind"] and said["tensors"]
        assert bool(said["masked_at"]) == (said["kind"] != "vocab")
        assert said == inspect(folder, said["name"])["explained"]
    with pytest.raises(ArchError, match="no axis is called 'hiddenn'; did you mean 'hidden'"):
        inspect(folder, "hiddenn")


def test_what_no_trace_found_has_the_tensors_of_its_description(folder: Path) -> None:
    """Of hidden dimensions, one entry of each tensor that reads or writes the stream."""
    said = inspect(folder, "hidden")["explained"]
    first = next(one for one in said["tensors"] if "embed" in one["name"])
    assert said["size"] == 32 and (first["dim"], first["entries"]) == (1, 1)


def test_heads_that_stay_are_not_offered(folder: Path, call: Call) -> None:
    code, out, _ = call("inspect", folder)
    heads = next(row for row in inspect(folder)["axes"] if row["kind"] == "head")
    assert code == 0 and ("stays" in heads) == ("a bert config cannot say that some are gone" in out)
    assert ("stays" in heads) == (inspect(folder)["architecture"] == "bert")


@pytest.mark.parametrize(("command", "near"), [("recipes", "gptqq"), ("methods", "wandaa")])
def test_only_what_is_near_is_proposed(command: str, near: str, call: Call) -> None:
    """A name far from all others is answered by those that there are."""
    assert "did you mean" in call(command, near)[2]
    said = call(command, "nope")[2]
    assert "did you mean" not in said and "; known: awq, besa, bonsai" in said
