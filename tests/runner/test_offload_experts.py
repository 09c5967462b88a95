"""Mixtures of experts whose weights stay on disk: the bytes of a run in memory, read and written expert by expert."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.conftest import Forked, work_of
from tests.methods.test_awq_experts import FAMILIES
from tests.runner.test_offload import limit, stored
from tests.runner.test_one_shot import SETS
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

import compresso
from compresso.arch.base import arch_for
from compresso.checkpoint.expert_pieces import Pieces, pieces_of
from compresso.checkpoint.header import read_header
from compresso.checkpoint.load import load_model
from compresso.checkpoint.source import open_source
from compresso.core.plan import Plan
from compresso.data import nano
from compresso.edit.shrink import shrink_
from compresso.edit.stock import as_stock
from compresso.formats.hf import save_checkpoint
from compresso.native import MOE_FILE
from compresso.runner.options import with_options

TOKENS = {"vocab_size": 1024, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LAYERS = 16
"""Of a small mixture that has to be larger than what is beside its largest block."""
RAW: dict[str, dict[str, Any]] = {
    "wanda": {"sparsity": 0.5},
    "gptq": {"bits": 4, "group": 8, "block": 8},
    "awq": {"bits": 4, "group": 8},
}


def checkpoint(folder: Path, name: str, dtype: torch.dtype) -> Path:
    """A small mixture as the hub has them, with the embedded tokenizer."""
    config = FAMILIES[name]()
    for field, value in TOKENS.items():
        setattr(config, field, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for own, buffer in model.named_buffers():
            if own.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.1, 0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size="60KB")
    AutoTokenizer.from_pretrained(nano.path()).save_pretrained(folder)
    return folder


def done(stage: str, folder: Path, data: Path, output: Path, **given: Any) -> compresso.Result:
    raw = {"name": stage, "data": {"source": str(data)}, "stages": [{stage: RAW[stage]}]}
    raw = with_options(raw, model=str(folder), sets=SETS)
    return compresso.run(raw, folder, data, output=output, quiet=True, allow_collapsed=True, **given)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_reopening")
@pytest.mark.parametrize(
    ("stage", "name", "dtype"),
    [
        ("wanda", "mixtral", torch.bfloat16),
        ("gptq", "mixtral", torch.float32),
        ("awq", "qwen2_moe", torch.float32),
        ("wanda", "deepseek_v3", torch.float32),
        ("gptq", "deepseek_v2", torch.float32),
    ],
)
def test_the_bytes_are_those_of_a_run_in_memory(
    stage: str, name: str, dtype: torch.dtype, instructions: Path, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path / "moe", name, dtype)
    whole = done(stage, folder, instructions, tmp_path / "whole")
    offloaded = done(stage, folder, instructions, tmp_path / "offloaded", offload=True)
    one, other = stored(whole.folder), stored(offloaded.folder)
    assert one.keys() == other.keys() == stored(folder).keys()
    assert all(torch.equal(tensor, other[own]) for own, tensor in one.items())
    assert whole.records["after"] == offloaded.records["after"]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_reopening")
def test_the_class_beside_an_offloaded_result_is_ours_and_not_the_source_s(instructions: Path, tmp_path: Path) -> None:
    """A folder of ours opens by the class that is imported here, so that whatever lies in its Python file is not run:
    it is not handed on either, nor is an auto_map that names other code.
    """
    folder, own = checkpoint(tmp_path / "moe", "mixtral", torch.float32), tmp_path / "own"
    model = as_stock(load_model(open_source(folder)))
    arch = arch_for(model.config)
    shrink_(model, arch.axes(model), Plan({"mlp": (1,)}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert save_checkpoint(model, arch.shapes(model), own, tokenizer=tokenizer) == "native"
    (own / MOE_FILE.name).write_text("raise SystemExit\n" + MOE_FILE.read_text())
    config = json.loads((own / "config.json").read_text())
    named = config.pop("auto_map")
    (own / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "owner/name--theirs.Config"}}))
    result = done("wanda", own, instructions, tmp_path / "out", offload=True)
    assert result.records["layout"] == "native"
    assert (tmp_path / "out" / MOE_FILE.name).read_bytes() == MOE_FILE.read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"] == named


@pytest.mark.slow
def test_killed_and_resumed_a_mixture_ends_in_the_same_bytes(
    instructions: Path, tmp_path: Path, forked: Forked
) -> None:
    """By SIGKILL behind the first block of two."""
    folder = checkpoint(tmp_path / "moe", "mixtral", torch.float32)
    sets = [*SETS, "stages.gptq.group=8", "stages.gptq.symmetric=true"]
    options = ["--model", str(folder), "--data", str(instructions), *(p for one in sets for p in ("--set", one))]

    def command(output: str, *more: str, **event: Any) -> tuple[int, str]:
        arguments = ["run", "gptq/4-g128", *options, "--output", str(tmp_path / output), "--allow-collapsed", *more]
        return forked(arguments, **event)

    code, log = command("whole", "--offload")
    assert code == 0, log
    assert command("killed", "--offload", event="kill", phase="gptq", at=1)[0] == -9
    begun = list((work_of(tmp_path / "killed") / "training" / "gptq").glob("step-*"))
    assert len(begun) == 1 and not (tmp_path / "killed").exists()
    code, log = command("killed", "--offload", "--resume")
    assert code == 0, log
    one, other = stored(tmp_path / "whole"), stored(tmp_path / "killed")
    assert one.keys() == other.keys() == stored(folder).keys()
    assert all(torch.equal(tensor, other[own]) for own, tensor in one.items())
    dense = stored(folder)
    assert all(not torch.equal(one[own], dense[own]) for own in one if ".experts." in own)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux: RLIMIT_DATA counts mapped memory there only")
def test_a_small_mixture_passes_within_half_of_its_bytes(instructions: Path, tmp_path: Path, forked: Forked) -> None:
    """Enforced by the system: with so much beside what Python and torch hold, it does not fit into memory."""
    folder = tmp_path / "small"
    size = large_checkpoint(folder, LAYERS, 512, 896)
    most = size // 2_000_000
    sets = ["data.held=1", "data.pack=false", "data.limit=3", "data.max_length=48"]
    options = ["--model", str(folder), "--data", str(instructions), *(p for one in sets for p in ("--set", one))]
    command = ["run", "wanda/50", *options, "--allow-collapsed", "--output"]
    code, log = forked([*command, str(tmp_path / "in-memory")], event="limit", at=most)
    assert code != 0 and "annot allocate memory" in log, log[-2000:]  # torch's words, or the system's
    code, log = forked([*command, str(tmp_path / "out"), "--offload"], event="limit", at=most)
    assert code == 0, log[-2000:]
    records = json.loads((tmp_path / "out" / "records.json").read_text())
    assert records["stages"]["wanda"]["sparsity"] == pytest.approx(0.5, abs=1e-3)


def test_pieces_are_put_together_as_transformers_does(tmp_path: Path) -> None:
    """Against the model that it opens; of each stack one linear is read after the other."""
    folder = checkpoint(tmp_path / "moe", "qwen2_moe", torch.float32)
    opened = AutoModelForCausalLM.from_pretrained(folder)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(opened.config)
    stored_names = {own for path in folder.glob("*.safetensors") for own in read_header(path)}
    found = pieces_of(empty, stored_names)
    assert set(found) == {own for own, p in opened.named_parameters() if p.dim() == 3}
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert found[name].names[0].endswith("experts.0.gate_proj.weight")
    read: list[str] = []
    tensors = stored(folder)

    def one(own: str) -> torch.Tensor:
        read.append(own)
        return tensors[own]

    whole = found[name].joined(one)
    assert torch.equal(whole, opened.get_parameter(name)) and read == list(found[name].names)
    assert all(torch.equal(piece, tensors[own]) for own, piece in found[name].split(whole))
    assert Pieces(("other",), (3,)).joined(lambda own: torch.ones(3)).tolist() == [1, 1, 1]


def large_checkpoint(folder: Path, layers: int, hidden: int, width: int) -> int:
    """A Mixtral of layers of 8 experts, float32, one file an expert, of which all hold the same numbers but for the
    routers; bytes written.
    """
    fields: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": width, "num_attention_heads": 16}
    fields |= {"num_key_value_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": True, **TOKENS}
    config = MixtralConfig(**fields, num_hidden_layers=layers, num_local_experts=8, num_experts_per_tok=2)
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    where: dict[str, str] = {}

    drawn: dict[tuple[int, ...], torch.Tensor] = {}

    def put(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        for size in shapes.values():
            if len(size) == 1:
                drawn[size] = torch.ones(size)
            elif size not in drawn or size[0] == 8:
                drawn[size] = torch.randn(size, generator=generator) * size[-1] ** -0.5
        tensors = {own: drawn[size].clone() for own, size in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, file))

    put("rest.safetensors", {"model.embed_tokens.weight": (1024, hidden), "model.norm.weight": (hidden,)})
    kv = hidden // 4
    for layer in range(layers):
        at = f"model.layers.{layer}"
        heads = {"q_proj": hidden, "k_proj": kv, "v_proj": kv, "o_proj": hidden}
        shapes: dict[str, tuple[int, ...]] = {f"{at}.self_attn.{n}.weight": (rows, hidden) for n, rows in heads.items()}
        shapes |= {f"{at}.{n}.weight": (hidden,) for n in ("input_layernorm", "post_attention_layernorm")}
        put(f"layer-{layer:03d}.safetensors", {**shapes, f"{at}.block_sparse_moe.gate.weight": (8, hidden)})
        for e in range(8):
            each = {"w1": (width, hidden), "w2": (hidden, width), "w3": (width, hidden)}
            put(
                f"layer-{layer:03d}-{e}.safetensors",
                {f"{at}.block_sparse_moe.experts.{e}.{n}.weight": size for n, size in each.items()},
            )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config.dtype, config.architectures = torch.float32, ["MixtralForCausalLM"]
    (folder / "config.json").write_text(config.to_json_string())
    AutoTokenizer.from_pretrained(nano.path()).save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def pruned_within(limit_bytes: int, folder: Path, instructions: Path, output: Path, *more: str) -> Any:
    """`wanda` in a process that may have so many bytes of data."""
    sets = ["data.held=1", "data.pack=false", "data.limit=3", "data.max_length=48"]
    arguments = ["run", "wanda/50", "--model", str(folder), "--data", str(instructions), "--output", str(output)]
    arguments += ["--allow-collapsed", *(part for one in sets for part in ("--set", one)), *more]
    start = [sys.executable, "-c", "import sys; from compresso.cli import main; main(sys.argv[1:])", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "2", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    return subprocess.run(
        start, preexec_fn=lambda: limit(limit_bytes), capture_output=True, text=True, env=env, check=False
    )


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux: RLIMIT_DATA counts mapped memory there only")
@pytest.mark.skipif(os.environ.get("COMPRESSO_LARGE") != "all", reason="COMPRESSO_LARGE: not all, and it writes 25 GB")
def test_eight_gigabytes_of_experts_are_pruned_within_three(instructions: Path, tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 32e9:
        pytest.skip("disk: 32 GB must be free")
    folder, output = tmp_path / "large", tmp_path / "out"
    try:
        assert large_checkpoint(folder, 12, 2048, 3584) > 8e9
        assert pruned_within(3_000_000_000, folder, instructions, output).returncode != 0  # the limit is real
        made = pruned_within(3_000_000_000, folder, instructions, output, "--offload")
        assert made.returncode == 0, made.stderr[-2000:]
        records = json.loads((output / "records.json").read_text())
        assert records["stages"]["wanda"]["sparsity"] == pytest.approx(0.5, abs=1e-3)
        assert records["reopened_max_abs_difference"] <= 1e-4
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(output, ignore_errors=True)
