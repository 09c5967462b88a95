"""Runs whose weights stay on disk: the same bytes as in memory, one block at a time, and a word about memory before the
start.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tests.conftest import Forked, work_of
from tests.runner.test_one_shot import GROUPS, SETS
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import compresso
from compresso.arch.base import arch_for
from compresso.core.plan import Plan
from compresso.data import nano
from compresso.edit.shrink import shrink_
from compresso.errors import NumericError, RecipeError, ResourceError
from compresso.formats.hf import save_checkpoint
from compresso.runner.options import with_options
from compresso.sweep.offload import Offloaded

RECIPES = {
    "wanda/50": [],
    "sparsegpt/50": [],
    "owl/70": [],
    "besa/50-4bit": [],
    "gptq/3": [],
    "awq/4-g128": [GROUPS],
    "smoothquant/w8a8": [],
    "e-sparse/2-4": [],
}


def done(recipe: str, folder: Path, data: Path, output: Path, **given: Any) -> compresso.Result:
    raw = with_options(recipe, model=str(folder), sets=[*SETS, *RECIPES.get(recipe, [])])
    return compresso.run(raw, folder, data, output=output, quiet=True, allow_collapsed=True, **given)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("quick_reopening")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_bytes_are_those_of_a_run_in_memory(
    recipe: str, dtype: torch.dtype, tiny_folder: Path, instructions: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tiny"
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=dtype)
    model.save_pretrained(folder, max_shard_size="20KB")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
    whole = done(recipe, folder, instructions, tmp_path / "whole")
    offloaded = done(recipe, folder, instructions, tmp_path / "offloaded", offload=True)
    one, other = stored(whole.folder), stored(offloaded.folder)
    assert one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    facts = [{**next(iter(result.records["stages"].values())), "seconds": 0} for result in (whole, offloaded)]
    assert facts[0] == facts[1]
    assert (
        whole.records["after"] == offloaded.records["after"] and whole.records["before"] == offloaded.records["before"]
    )
    opened = AutoModelForCausalLM.from_pretrained(offloaded.folder, dtype=torch.float32)
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(offloaded.model(input_ids=ids).logits, opened(input_ids=ids).logits)
    assert "texts" in offloaded.records["report"]["models"][1]["not_measured"]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_reopening")
def test_a_checkpoint_of_uneven_layers_is_streamed_as_well(
    tiny_folder: Path, instructions: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    arch = arch_for(model.config)
    shrink_(
        model,
        arch.axes(model),
        Plan({"layers.0.channels": (1, 3, 5, 8), "layers.1.heads": (0, 2), "attention": (0, 1), "mlp": (0, 2)}),
    )
    native = tmp_path / "native"
    assert (
        save_checkpoint(model, arch.shapes(model), native, tokenizer=AutoTokenizer.from_pretrained(tiny_folder))
        == "native"
    )
    whole = done("wanda/50", native, instructions, tmp_path / "whole")
    offloaded = done("wanda/50", native, instructions, tmp_path / "offloaded", offload=True)
    one, other = stored(whole.folder), stored(offloaded.folder)
    assert one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert offloaded.records["layout"] == "native"
    ids = torch.arange(3, 20).unsqueeze(0)
    with torch.no_grad():
        opened = compresso.load(offloaded.folder).model(input_ids=ids).logits
    torch.testing.assert_close(opened, whole.model.eval()(input_ids=ids).logits.detach())


def test_no_more_than_one_block_is_in_memory(
    tiny_folder: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[set[str]] = []
    plain = Offloaded._put

    def watched(self: Offloaded, name: str, parameter: torch.nn.Parameter) -> None:
        plain(self, name, parameter)
        held.append(
            {
                ".".join(name.split(".")[:3])
                for name, parameter in self.model.named_parameters()
                if not parameter.is_meta
            }
        )

    monkeypatch.setattr(Offloaded, "_put", watched)
    result = done("wanda/50", tiny_folder, instructions, tmp_path / "out", offload=True)
    blocks = [{name for name in names if name.startswith("model.layers.")} for names in held]
    assert max(map(len, blocks)) == 1 and {name for names in blocks for name in names} == {
        f"model.layers.{i}" for i in range(3)
    }
    assert all(parameter.is_meta for parameter in result.model.parameters())


@pytest.mark.slow
def test_killed_and_resumed_it_ends_in_the_same_bytes(
    tiny_folder: Path, instructions: Path, tmp_path: Path, forked: Forked
) -> None:
    def command(output: Path, *more: str, event: str = "", at: int = 0, phase: str = "sparsegpt") -> tuple[int, str]:
        arguments = [
            "run",
            "sparsegpt/50",
            "--model",
            str(tiny_folder),
            "--data",
            str(instructions),
            "--output",
            str(output),
        ]
        return forked(
            [*arguments, *(part for one in SETS for part in ("--set", one)), *more], event=event, phase=phase, at=at
        )

    code, log = command(tmp_path / "whole", "--allow-collapsed", "--offload")
    assert code == 0, log
    assert "memory: about 0." in log and "the largest block, while it is written" in log
    assert command(tmp_path / "killed", event="kill", at=1)[0] == -9  # in memory, as where memory gives out
    assert command(tmp_path / "killed", "--resume", "--offload", event="kill", at=2)[0] == -9
    assert len(list((work_of(tmp_path / "killed") / "training" / "sparsegpt").glob("step-*"))) == 2
    code, log = command(tmp_path / "killed", "--resume", "--allow-collapsed", "--offload")
    assert code == 0, log
    one, other = stored(tmp_path / "whole"), stored(tmp_path / "killed")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert not work_of(tmp_path / "killed").exists()
    assert command(tmp_path / "done", event="kill", phase="saved", at=1)[0] == -9
    code, log = command(tmp_path / "done", "--resume", "--offload")
    assert code == 2 and "has finished its stage in memory; resume it without --offload" in log


def test_what_cannot_be_streamed_is_refused(tiny_folder: Path, instructions: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError,
        match=r"recipe gate-taylor \(gate_taylor, recover\) cannot be offloaded: wanted one stage that sweeps",
    ):
        compresso.run("gate-taylor", tiny_folder, instructions, output=tmp_path / "out", offload=True)
    with pytest.raises(RecipeError, match=r"recipe magnitude/50 \(magnitude\) cannot be offloaded"):
        compresso.run("magnitude/50", tiny_folder, output=tmp_path / "out", offload=True)
    for layout in ("padded", "native"):
        with pytest.raises(
            RecipeError, match=f"layout='{layout}': an offloaded run writes its model in the layout it came in"
        ):
            done("wanda/50", tiny_folder, instructions, tmp_path / "out", offload=True, layout=layout)
    assert not list(tmp_path.iterdir())


def test_more_memory_than_there_is_is_refused_unless_insisted_upon(
    tiny_folder: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compresso.sweep.memory.available", lambda device: 1_000_000)
    with pytest.raises(
        ResourceError, match=r"this needs about 0\.\d+ GB at once \(.*\), and 0\.00 GB are there\..*over_memory=True"
    ):
        done("wanda/50", tiny_folder, instructions, tmp_path / "out", offload=True)
    assert not list(tmp_path.iterdir())
    assert done("wanda/50", tiny_folder, instructions, tmp_path / "out", offload=True, over_memory=True).folder.is_dir()


def test_a_damaged_block_is_named(tiny_folder: Path, instructions: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_folder, folder)
    tensors = stored(folder)
    tensors["model.layers.2.mlp.up_proj.weight"][1, 1] = float("inf")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericError, match=r"'model\.layers\.2\.mlp\.up_proj\.weight' holds NaN or Inf"):
        done("wanda/50", folder, instructions, tmp_path / "out", offload=True)


def large_checkpoint(folder: Path, layers: int) -> int:
    """A LLaMA of `layers` blocks of 50 million parameters, float32, one file a block, of which all hold the same
    numbers; bytes written.
    """
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=1,
        num_attention_heads=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    one = {
        name: tensor.clone()
        for name, tensor in LlamaForCausalLM(config).state_dict().items()
        if name != "lm_head.weight"
    }
    folder.mkdir()
    where: dict[str, str] = {}
    for layer in range(layers):
        block = {
            name.replace("layers.0.", f"layers.{layer}."): tensor for name, tensor in one.items() if "layers.0." in name
        }
        save_file(block, folder / f"block-{layer:03d}.safetensors", metadata={"format": "pt"})
        where |= dict.fromkeys(block, f"block-{layer:03d}.safetensors")
    rest = {name: tensor for name, tensor in one.items() if "layers.0." not in name}
    save_file(rest, folder / "rest.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where | dict.fromkeys(rest, "rest.safetensors")})
    )
    config.num_hidden_layers, config.dtype = layers, torch.float32
    config.architectures = ["LlamaForCausalLM"]
    (folder / "config.json").write_text(config.to_json_string())
    AutoTokenizer.from_pretrained(nano.path()).save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def limit(size: int) -> None:
    """Of a child process: so many bytes of data, whatever it is, enforced by the system."""
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def limited() -> None:
    """Of a child process: 2 GB."""
    limit(2_000_000_000)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux: RLIMIT_DATA counts mapped memory there only")
@pytest.mark.skipif(
    os.environ.get("COMPRESSO_LARGE") not in ("1", "all"),
    reason="COMPRESSO_LARGE: neither 1 nor all, and it writes 25 GB",
)
def test_eight_gigabytes_are_pruned_within_two(instructions: Path, tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 32e9:
        pytest.skip("disk: 32 GB must be free")
    folder, output = tmp_path / "large", tmp_path / "out"
    try:
        assert large_checkpoint(folder, 40) > 8e9
        sets = ["data.held=1", "data.pack=false", "data.limit=3", "data.max_length=48"]
        arguments = [
            "run",
            "wanda/50",
            "--model",
            str(folder),
            "--data",
            str(instructions),
            "--output",
            str(output),
            "--allow-collapsed",
        ]
        arguments += [part for one in sets for part in ("--set", one)]
        program = "import os, sys; from compresso.cli import main; os.fsync = lambda *_: None; main(sys.argv[1:])"
        start = [sys.executable, "-c", program, *arguments]  # 16 GB forced to disk take a minute and prove nothing here
        env = {**os.environ, "OMP_NUM_THREADS": "2", "ARROW_DEFAULT_MEMORY_POOL": "system"}
        whole = subprocess.run(start, preexec_fn=limited, capture_output=True, text=True, env=env, check=False)
        assert whole.returncode != 0  # the limit is real: the model does not fit
        offloaded = subprocess.run(
            [*start, "--offload"], preexec_fn=limited, capture_output=True, text=True, env=env, check=False
        )
        assert offloaded.returncode == 0, offloaded.stderr[-2000:]
        records = json.loads((output / "records.json").read_text())
        assert records["stages"]["wanda"]["changed"] == 280 and records["stages"]["wanda"]["sparsity"] == pytest.approx(
            0.5, abs=1e-3
        )
        assert records["reopened_max_abs_difference"] <= 1e-4
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(output, ignore_errors=True)
