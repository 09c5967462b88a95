"""`compresso export --format low-rank`: what svd truncated becomes products of two, smaller, opened by transformers
with compresso or with the file beside the weights, and by nothing else.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import Call, reopen_here
from transformers import AutoModelForCausalLM

import compresso
from compresso.checkpoint.code import trusted
from compresso.checkpoint.source import open_source
from compresso.commands.export import export
from compresso.core.low_rank import factored_size, most_rank
from compresso.engines.parity import Format, ids_of, reference_of
from compresso.engines.transformers import LOW_RANK, OWN, PLAIN, REMOTE, Transformers
from compresso.engines.transformers_process import NEW_TOKENS
from compresso.engines.verify import parities
from compresso.errors import CheckpointError, ExportError
from compresso.formats.low_rank import factored_linears
from compresso.native import LOW_RANK_FILE
from compresso.runner.options import with_options
from compresso.runner.run import Result, run

IDS = torch.arange(3, 40).unsqueeze(0)


@pytest.fixture(scope="module")
def truncated(tiny_folder: Path, instructions: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """What a run of svd/whitened wrote."""
    sets = ["data.held=4", "data.pack=false", "data.limit=12", "stages.svd.keep=0.6"]
    raw = with_options("svd/whitened", model=str(tiny_folder), sets=sets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compresso.runner.output.reopen_and_compare", reopen_here)
        output = tmp_path_factory.mktemp("truncated") / "out"
        return run(raw, tiny_folder, instructions, output=output, quiet=True, allow_collapsed=True, measure="none")


def unasked(truncated: Path, output: Path) -> dict[str, Any]:
    """The export, without the process that opens it: `test_verify_...` has that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Transformers, "missing", lambda _: "not asked here")
        return export(truncated, output, format="low-rank")


@pytest.fixture(scope="module")
def factored(truncated: Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That, exported; its `facts` lie beside it."""
    folder = tmp_path_factory.mktemp("factored") / "out"
    facts = unasked(truncated.folder, folder)
    (folder.parent / "facts.json").write_text(json.dumps(facts))
    return folder


def test_it_computes_the_same_with_as_many_numbers_as_the_run_said(truncated: Result, factored: Path) -> None:
    facts, noted = json.loads((factored.parent / "facts.json").read_text()), truncated.records["stages"]["svd"]
    assert facts["arch"] == "compresso_lowrank_llama" and facts["dtype"] == "float32"
    opened = AutoModelForCausalLM.from_pretrained(factored, dtype=torch.float32).eval()
    with torch.no_grad():
        live = truncated.model.eval()(input_ids=IDS).logits
        torch.testing.assert_close(opened(input_ids=IDS).logits, live, atol=1e-4, rtol=1e-4)
        cached = opened.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert torch.equal(cached, truncated.model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0))
    stored = load_file(factored / "model.safetensors")
    dense = sum(parameter.numel() for parameter in truncated.model.parameters())
    numbers = sum(one.numel() for one in stored.values())
    assert numbers == sum(one.numel() for one in opened.parameters())
    assert numbers == dense - noted["weights"] + noted["factored"]
    assert opened.config.ranks == noted["ranks"]
    for name, rank in noted["ranks"].items():
        assert stored[f"{name}.right.weight"].shape[0] == stored[f"{name}.left.weight"].shape[1] == rank
        assert f"{name}.weight" not in stored
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (factored, truncated.folder)]
    assert facts["bytes"] == sizes[0] < sizes[1]
    card = (factored / "README.md").read_text()
    assert f"{numbers:,} in\nplace of {dense:,}" in card and f"{noted['factored']:,} numbers" in card


@pytest.mark.slow
def test_three_ways_into_it_and_what_each_says(truncated: Result, factored: Path) -> None:
    assert trusted(factored)
    model = compresso.load(truncated.folder, dtype=torch.float32).model.eval()
    reference = reference_of(model, ids_of(None, model.config.vocab_size))
    for engine in (OWN, REMOTE):
        found = engine.parity(factored, reference)
        assert (found.opens, found.same_tokens) == ("yes", NEW_TOKENS), found.reason
    found = PLAIN.parity(factored, reference)
    assert found.opens == "no" and "contains custom code" in found.reason


@pytest.mark.slow
def test_verify_tries_it_where_svd_has_been_and_only_there(
    truncated: Result, tiny_folder: Path, tmp_path: Path
) -> None:
    facts = export(truncated.folder, tmp_path / "exported", format="low-rank")
    assert facts["checked"] == "opened in transformers" and facts["same_tokens"] == NEW_TOKENS
    shutil.rmtree(tmp_path / "exported")
    reference = reference_of(truncated.model.eval(), ids_of(None, truncated.model.config.vocab_size))
    (found,) = parities(Format.LOW_RANK, [LOW_RANK], open_source(truncated.folder), reference, tmp_path)
    assert (found.engine, found.opens, found.same_tokens) == ("transformers, low rank", "yes", NEW_TOKENS)
    assert parities(Format.LOW_RANK, [LOW_RANK], open_source(tiny_folder), reference, tmp_path) == []
    assert not list(tmp_path.iterdir())


def test_it_is_run_and_measured_and_refused_by_what_changes_or_converts_it(
    factored: Path, call: Call, tmp_path: Path
) -> None:
    assert compresso.load(factored).model(input_ids=IDS).logits.isfinite().all()
    cure = "its linears are products of low rank, which only transformers opens. Give the folder that it was exported"
    with pytest.raises(CheckpointError, match=cure):
        open_source(factored)
    for words in (
        ("run", "magnitude/50", "--model", factored, "--output", tmp_path / "out"),
        ("plan", "magnitude/50", "--model", factored),
        ("export", factored, "--format", "gguf", "--output", tmp_path / "out.gguf"),
        ("export", factored, "--format", "vllm-deci", "--output", tmp_path / "out"),
        ("export", factored, "--format", "low-rank", "--output", tmp_path / "out"),
    ):
        code, _, error = call(*words)
        assert code == 2 and cure in error and len(error.strip().splitlines()) == 1
    unused = reference_of(compresso.load(factored).model.float().eval(), IDS[0])
    for written in (Format.GGUF, Format.ONNX, Format.DECI):
        (found,) = parities(written, [PLAIN], open_source(factored, packed=True), unused, tmp_path)
        assert found.opens in ("not checked", "not installed")
        assert found.opens != "not checked" or f"which {written} does not hold; export the folder" in found.reason


def test_what_it_was_exported_from_opens_everywhere(truncated: Result) -> None:
    """A run's folder is stock: of its own class, with the shapes of the dense model."""
    config = json.loads((truncated.folder / "config.json").read_text())
    assert config["model_type"] == "llama" and "auto_map" not in config and truncated.records["layout"] == "uniform"
    assert not list(truncated.folder.glob("*.py"))
    card = " ".join((truncated.folder / "README.md").read_text().split())
    assert "are stored multiplied out; compresso export --format low-rank writes their factors" in card
    assert "no smaller and no faster" in card


def test_a_later_stage_is_seen_in_the_weights(truncated: Result, tmp_path: Path) -> None:
    """A rank that grew is exported at what it is, a full one stays whole, and nothing left is refused."""
    changed = tmp_path / "changed"
    shutil.copytree(truncated.folder, changed)
    model = AutoModelForCausalLM.from_pretrained(changed, dtype=torch.float32)
    ranks = truncated.records["stages"]["svd"]["ranks"]
    grown, whole, *_ = (name for name in ranks if name.endswith("gate_proj"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight = model.get_submodule(grown).weight
        weight += torch.outer(*(0.1 * torch.randn(size, generator=generator) for size in weight.shape))
        model.get_submodule(whole).weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
        kept = {name: one.clone() for name, one in model.state_dict().items()}
    model.save_pretrained(changed)
    unasked(changed, tmp_path / "out")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert ranks[grown] < most_rank(*weight.shape)
    assert opened.config.ranks == {name: rank + (name == grown) for name, rank in ranks.items() if name != whole}
    assert torch.equal(opened.get_submodule(whole).weight, kept[f"{whole}.weight"])
    left, right = (opened.get_submodule(grown).get_submodule(part).weight for part in ("left", "right"))
    torch.testing.assert_close(left @ right, kept[f"{grown}.weight"], atol=1e-5, rtol=1e-5)
    assert factored_size(*weight.shape, ranks[grown] + 1) < weight.numel()

    with torch.no_grad():
        for name in ranks:
            weight = model.get_submodule(name).weight
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(changed)
    with pytest.raises(ExportError, match="has a low rank now: a later stage rounded, zeroed or tuned them"):
        export(changed, tmp_path / "none", format="low-rank")
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_layers_that_left_since_and_the_new_numbers_of_the_others(
    tiny_folder: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """svd works on the layers 1 and 2; what a linear's name says is another layer once one of them is gone."""
    monkeypatch.setattr("compresso.runner.output.reopen_and_compare", reopen_here)
    svd = {"keep": 0.6, "where": {"layers": [1, 3]}}
    raw = {
        "name": "mine",
        "data": {"held": 4, "pack": False, "limit": 12},
        "stages": [{"svd": svd}, {"drop_layers": {"keep": 0.7, "batches": 2, "batch": 4}}],
    }
    found = run(raw, tiny_folder, instructions, output=tmp_path / "cut", quiet=True, measure="none")
    kept = json.loads((tmp_path / "cut" / "plan.json").read_text())["kept"]["layers"]
    assert len(kept) == 2
    unasked(tmp_path / "cut", tmp_path / "out")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ranks, now = found.records["stages"]["svd"]["ranks"], {str(old): str(new) for new, old in enumerate(kept)}
    parts = [(name.split("."), rank) for name, rank in ranks.items()]
    assert opened.config.ranks == {
        ".".join([*name[:2], now[name[2]], *name[3:]]): rank for name, rank in parts if name[2] in now
    }
    with torch.no_grad():
        live = found.model.eval()(input_ids=IDS).logits
        torch.testing.assert_close(opened(input_ids=IDS).logits, live, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("first", "gone"), [(True, 0), (False, 0), (False, 1), (False, 2)])
def test_every_linear_that_may_have_a_low_rank_is_looked_at(first: bool, gone: int, tmp_path: Path) -> None:
    """Under its number now, whichever layers left, and before svd names are as they were."""
    svd = {"svd": {"ranks": {"model.layers.1.mlp.up_proj": 3, "model.layers.2.mlp.up_proj": 3}}}
    cut = {"drop_layers": {"units_kept": {"layers": f"{3 - gone}/3"}}}
    (tmp_path / "records.json").write_text(json.dumps({"stages": {**cut, **svd} if first else {**svd, **cut}}))
    layers = (1, 2) if not gone else range(3 - gone)
    assert factored_linears(tmp_path) == tuple(f"model.layers.{i}.mlp.up_proj" for i in layers)


def test_what_an_earlier_run_did_is_said_not_to_be_known(truncated: Result, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(truncated.folder, changed)
    records = json.loads((changed / "records.json").read_text())
    (changed / "records.json").write_text(json.dumps({**records, "stages": {"recover": {}}}))
    with pytest.raises(ExportError, match=r"no stage of the run that wrote it \(recover\), .* into one recipe"):
        export(changed, tmp_path / "out", format="low-rank")


def test_what_cannot_be_factored_is_refused(truncated: Result, tiny_folder: Path, tmp_path: Path, call: Call) -> None:
    with pytest.raises(ExportError, match=r"nothing in it with a low rank, so .*; run svd on it first"):
        export(tiny_folder, tmp_path / "out", format="low-rank")
    with pytest.raises(ExportError, match="dtype='f32': low-rank keeps the stored one"):
        export(truncated.folder, tmp_path / "out", format="low-rank", dtype="f32")
    assert not (tmp_path / "out").exists()


def test_it_is_replaced_only_while_nobody_put_anything_into_it(
    truncated: Result, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(LOW_RANK), "missing", lambda _: "not asked here")
    words = ("export", truncated.folder, "--format", "low-rank", "--output", tmp_path / "out")
    assert call(*words)[0] == 0
    assert "--overwrite" in call(*words)[2]
    assert call(*words, "--overwrite")[0] == 0
    (tmp_path / "out" / "mine").touch()
    assert "holds mine" in call(*words, "--overwrite")[2]


@pytest.mark.parametrize("what", ["changed", "absent", "the other file"])
def test_its_code_is_run_byte_for_byte_or_not(what: str, factored: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(factored, folder)
    assert trusted(folder)
    code = folder / LOW_RANK_FILE.name
    same = code.read_bytes()
    code.unlink()
    if what == "changed":
        code.write_bytes(same + b"\nopen('ran', 'w')\n")
    elif what == "the other file":
        code.write_bytes(LOW_RANK_FILE.with_name("modeling_compresso.py").read_bytes())
    with pytest.raises(CheckpointError, match="is not the file that this version of compresso writes, and is not run"):
        trusted(folder)
    assert compresso.load(folder).model(input_ids=IDS).logits.isfinite().all()  # which does not read it


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ({"lm_head": 2}, "lm_head, which is no linear of a layer"),
        ({"model.layers.0": 2}, "model.layers.0, which is no linear of a layer"),
        ({"model.layers.0.mlp.up_proj": 0}, "the rank 0; wanted 1 to"),
        ({"model.layers.0.mlp.up_proj": 10**9}, "the rank 1000000000; wanted 1 to"),
        ({"model.layers.0.mlp.up_proj": "two"}, "ranks"),
    ],
)
def test_a_strangers_ranks_are_refused_in_one_line(ranks: object, said: str, factored: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(factored, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "ranks": ranks}))
    with pytest.raises(CheckpointError) as raised:
        compresso.load(folder)
    assert said in str(raised.value) and "\n" not in str(raised.value)
