"""The command line: what it prints, the codes it exits with, and one line with the cure for everything that can be said
wrong.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CodeGenConfig, CodeGenForCausalLM

from compresso import cli
from compresso.commands import inspect
from compresso.errors import Interrupted, NumericError, ResourceError
from tests.conftest import SHORT, Call

VERBS = ("demo", "methods", "recipes", "inspect", "plan", "run", "evaluate", "measure", "compare", "export", "verify")
NOTHING = "stages: [{magnitude_structured: {keep: 0.7}}]\n"


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Nothing here may read weights, but for tests that say so."""
    if "reads_weights" in request.fixturenames:
        return

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(sys.modules["compresso.runner.first_job"], "load_model", refuse)


@pytest.fixture
def reads_weights() -> None:
    """Lets a test run."""


@pytest.fixture
def refused(call: Call, tiny_folder: Path, instructions: Path, tmp_path: Path) -> Callable[..., str]:
    """refused(recipe, *more, model=..., data=...): the one line on stderr; exit code 2, and nothing written."""

    def _refused(
        recipe: object, *more: object, model: object = tiny_folder, data: object = instructions, code: int = 2
    ) -> str:
        there = sorted(path for path in tmp_path.rglob("*"))
        given = [] if data is None else ["--data", data]
        found, out, error = call("run", recipe, "--model", model, *given, "--output", tmp_path / "new" / "out", *more)
        assert (found, out) == (code, "")
        assert len(error.splitlines()) == 1, error
        assert sorted(path for path in tmp_path.rglob("*")) == there
        return error

    return _refused


def written(tmp_path: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compreso",), "unknown recipe 'compreso': neither a shipped recipe nor a file; did you mean 'compresso'?"),
        (("sparse-finetune",), "a file; did you mean one of sparse-finetune/50, sparse-finetune/50-16-32,"),
        (("sparse_finetun",), "a file; did you mean one of sparse-finetune/50, sparse-finetune/50-16-32,"),
        (("rtn",), "did you mean 'rtn/4-bit'?"),
        (("compresso", "--keep", "0"), "--keep 0.0: the kept share of block parameters lies in (0, 1]"),
        (("compresso", "--keep", "1.5"), "--keep 1.5"),
        (("compresso", "--keep", "nan"), "--keep nan"),
        (("compresso", "--keep", "half"), "usage: Invalid value for '--keep': 'half': wanted a number. See"),
        (("compresso", "--keep=70%"),
         "usage: Invalid value for '--keep': '70%': wanted a number; write 0.7. See `compresso run --help`"),
        (("compresso", "--measure", "fast"), "for '--measure': 'fast' is not one of 'none', 'quick', 'full'. See"),
        (("compresso", "--seed", "1.5"), "for '--seed': '1.5': wanted a whole number. See"),
        (("compresso", "--keep", "0.7", "--macs", "2"), "--keep and --macs are two budgets; give one"),
        (("compresso", "--keep", "0.6", "--set", "stages.learn_gates.keep=0.5"),
         "--keep 0.6 and --set stages.learn_gates.keep=0.5 are two budgets; give one"),
        (("compresso", "--macs", "2", "--set", "stages.learn_gates.of=total"),
         "--macs 2.0 and --set stages.learn_gates.of=total are two budgets; give one"),
        (("compresso", "--bytes-at-context", "64", "--set", "stages.learn_gates.of=total"),
         "--bytes-at-context 64 and --set stages.learn_gates.of=total are two budgets; give one"),
        (("compresso", "--max-steps", "4", "--set", "stages.recover.max_steps=8"),
         "--max-steps 4 and --set stages.recover.max_steps=8 both set max_steps; give one"),
        (("compresso", "--layout", "uniform", "--set", "stages.learn_gates.layout=free"),
         "--layout uniform and --set stages.learn_gates.layout=free both set layout; give one"),
        (("compresso", "--target", "vllm:tp2", "--set", "stages.learn_gates.layout=free"),
         "--target vllm:tp2 and --set stages.learn_gates.layout=free both set layout; give one"),
        (("compresso", "--set", "data.source=world"), "and --set data.source=world both set data.source; give one"),
        (("compresso", "--parameters", "5.4Q"),
         "--parameters '5.4Q': wanted a positive number with an optional K, M, B or T"),
        (("compresso", "--parameters", "-3M"), "--parameters '-3M'"),
        (("compresso", "--parameters", "5B"), "--parameters 5B: the model has"),
        (("compresso", "--macs", "0.5"), "--macs 0.5: the dense model's multiply-accumulates a token over those of the"
         " smaller one; wanted at least 1, such as 1.5; to keep 0.5 of them, give 2"),
        (("compresso", "--macs", "inf"), "--macs inf"),
        (("compresso", "--speedup", "1.5"), "--speedup 1.5 is measured time and needs --latency-table, the file that"
         " `compresso latency --output` writes; for multiply-accumulates, which measure no time, give --macs"),
        (("compresso", "--milliseconds", "20"), "--milliseconds 20 is measured time and needs --latency-table"),
        (("compresso", "--bytes-at-context", "0"),
         "usage: Invalid value for '--bytes-at-context': '0': wanted at least 1. See"),
        (("compresso", "--bytes-at-context", "64", "--macs", "2"),
         "--macs and --bytes-at-context are two budgets; --bytes-at-context goes with --keep"),
        (("compresso", "--macs", "1000"), "--macs 1000 is above the most of 1.386 ("),
        (("wanda/50", "--keep", "0.7"), "--keep 0.7: no stage of recipe 'wanda/50' (wanda) takes a share of the units"
         " away; leave it out, or set the share of zeros: --set stages.wanda.sparsity=0.3\n"),
        (("wanda/50", "--macs", "2"), "--macs 2: no stage of recipe 'wanda/50' (wanda) takes a share of the units away;"
         " leave it out, or set stages.wanda.sparsity, now 0.5, with --set\n"),
        (("wanda/2-4", "--keep", "0.5"), "leave it out, or set stages.wanda.pattern, now 2:4, with --set\n"),
        (("smoothquant/w8a8", "--keep", "0.5"), "(smoothquant) takes a share of the units away; leave it out\n"),
        (("svd/plain", "--macs", "2"), "(svd) counts anything but parameters of what it factors; give --keep in its"),
        (("moe/expert-drop", "--parameters", "20K"), "--parameters 20K: no stage of recipe 'moe/expert-drop'"
         " (drop_experts) has a budget of that, its keep is a share of each layer's experts; give --keep in its"
          " place\n"),
        (("moe/reap-50", "--macs", "1.5"), "(drop_experts) has a budget of that, its keep is a share of each layer's"),
        (("slicegpt/20", "--macs", "1.5"), "has a budget of that, its keep is a share of the stream's dimensions;"),
        (("moe/slim-2-4",), "modules: '*.experts.*' names experts, and a llama has none; give a mixture of experts"),
        (("wanda/50", "--max-steps", "3"),
         "--max-steps 3: no stage of recipe 'wanda/50' (wanda) trains in steps that it could cap; leave it out\n"),
        (("besa/50", "--max-steps", "3"), "could cap; leave it out, or set stages.besa.epochs"),
        (("compresso", "--layout", "unifrom"), "--layout 'unifrom' is unknown; did you mean 'uniform'?"),
        (("compresso", "--max-steps", "0"), "usage: Invalid value for '--max-steps'"),
        (("compresso", "--set", "stages.learn_gates.mask_lr"),
         "wanted path=value, such as stages.learn_gates.mask_lr=0.02"),
        (("compresso", "--set", "stages.learn_gates.mask_rl=1"), "unknown knob 'mask_rl'; did you mean 'mask_lr'?"),
        (("compresso", "--set", "stages.lern_gates.mask_lr=1"),
         "the recipe has no stage 'lern_gates'; did you mean 'learn_gates'?"),
        (("compresso", "--set", "stages.learn_gates.mask_lr=-1"),
         "mask_lr=-1: wanted at least 0"),
        (("compresso", "--set", "stages.learn_gates.mask_lr=.nan"), "mask_lr=nan: wanted a finite number"),
        (("compresso", "--set", "stages.learn_gates.mask_lr=[1"), "the value line 1 is not plain YAML"),
        (("compresso", "--set", "stages.learn_gates.kinds.0=head"), "holds no '0'; set the whole value instead"),
        (("compresso", "--set", "stages.learn_gates.kinds=[]"), "stage 'learn_gates': kinds is empty"),
        (("compresso", "--set", "stages.learn_gates.kinds=[heads]"), "kinds.0='heads': wanted 'head', 'query'"),
        (("compresso", "--set", "stages.learn_gates.hold=2 epoches"),
         "hold='2 epoches': duration '2 epoches' is not understood"),
        (("compresso", "--set", "stages.learn_gates.batch=6"), "batch=6 cannot be split into micro-batches of 4"),
        (("compresso", "--set", "stages.recover.targets=[q_porj]"), "did you mean 'q_proj'?"),
        (("compresso", "--set", "stages.learn_gates.floor={channel: 48}", "--keep", "0.4"),
         "may not go below 48 of 48 units"),
        (("compresso", "--set", "data.held=-1"), "held=-1: wanted at least 0"),
        (("compresso", "--set", "data.held=1000"), "1000 are held out; give more, or lower data.held"),
        (("compresso", "--set", "data.max_length=64"), "raise max_length or turn the collaborative prompt off"),
        (("compresso", "--set", "data=5"), "wanted stages.STAGE.KNOB=value or data.KNOB=value"),
        (("compresso", "--nonsense",), "(Possible options: --seed). See `compresso run --help`"),
        (("compresso", "--dataset", "d.jsonl"), "No such option: --dataset; give --data. See `compresso run --help`"),
        (("compresso", "--set", "stages.learn_gates.batch=nan"), "batch='nan': wanted a whole number"),
        (("compresso", "--set", "stages.learn_gates.floor.channel=x"),
         "floor.channel='x': wanted a whole number or 'keep'"),
        (("compresso", "--set", "stages.recover.steps=1.5"), "steps=1.5: wanted a whole number or a text"),
    ],
)  # fmt: skip
def test_a_wrong_word_is_named_with_its_cure(
    refused: Callable[..., str], arguments: tuple[str, ...], message: str
) -> None:
    assert message in refused(*arguments)


def test_an_option_of_another_name_is_told_ours(call: Call, tmp_path: Path) -> None:
    given = ("export", tmp_path, "--format", "gguf", "--output", tmp_path / "m.gguf", "--precision", "q4_0")
    usage = "usage: No such option: --precision; give --dtype. See `compresso export --help`\n"
    assert call(*given) == (2, "", usage)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: [{learn_gatse: {}}]", "unknown stage 'learn_gatse'; did you mean 'learn_gates'?"),
        ("stages: [{recover: {}}, {recover: {}}]", "stage 'recover' stands twice"),
        ("stage: [{recover: {}}]", "must be a mapping with the key 'stages'"),
        ("stages: [{recover: {}}]\nstagse: []", "unknown key 'stagse'; did you mean 'stages'?"),
        ("stages: {recover: {}}", "'stages' must be a list"),
        ("stages: [3]", "a stage is one name with its knobs"),
        ("stages: []", "{keep: 0.7}}], got an empty list; name at least one stage"),
        ("stages: [{recover: 5}]", "knobs must be a mapping such as {rank: 8}, got 5"),
        ("stages: [{recover: {}}]\ndata: 3", "data: knobs must be a mapping"),
        ("stages: [{recover: {rank: 1, rank: 2}}]", "the key 'rank' twice in one mapping (line 1)"),
        ("stages: [{recover: &a {rank: 1}}, {gate_taylor: *a}]", "YAML alias"),
        ("stages: [{recover: !!python/object/apply:os.system ['touch canary']}]",
         "line 1 is not plain YAML: could not determine"),
        ("stages: " + "[" * 4000 + "]" * 4000, "nested too deeply; at most 12"),
        ("stages: [{recover: {rank: " + "9" * 5000 + "}}]", "is not plain YAML"),
        ("stages: [{recover: {rank: 2024-13-45}}]", "is not plain YAML"),
        ("? [a, b]\n: 1\nstages: []", "a key that is no plain word (line 1)"),
        ("stages: [{recover: {}}]\n#" + "x" * 70_000, "more than the 65536 bytes"),
        ("stages: [{recover: {}}]\x00", "is not plain YAML"),
        ("", "must be a mapping"),
    ],
)  # fmt: skip
def test_a_bad_recipe_file_is_refused(refused: Callable[..., str], tmp_path: Path, text: str, message: str) -> None:
    assert message in refused(written(tmp_path, text))
    assert not Path("canary").exists()


def test_a_folder_in_a_recipes_place_is_called_one(refused: Callable[..., str], tmp_path: Path) -> None:
    folder = tmp_path / "earlier"
    folder.mkdir()
    said = f"recipe '{folder}' is a folder; wanted a recipe file (YAML)"
    assert f"{said} or a shipped name; see `compresso recipes`\n" in refused(folder)
    held = written(folder, "stages: [{recover: {}}]")
    assert f"{said} such as {held} or a shipped name" in refused(folder)


def test_recipes_that_are_no_text(refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"stages: [\xff\xfe]")
    assert "is not UTF-8 text (byte 9)" in refused(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "rows.jsonl"),
        ('{"instruction": "a", "input": "", "output": "b"}\n{"instruction": "a"}\n', "rows.jsonl:2"),
        ("not json\n", "rows.jsonl:1"),
        ('{"instruction": "a", "output": ""}\n', "nothing to learn"),
    ],
)
def test_bad_data_is_named_by_file_and_line(
    refused: Callable[..., str], tmp_path: Path, content: str, message: str
) -> None:
    assert message in refused("gate-taylor", data=written(tmp_path, content, "rows.jsonl"))


def test_data_that_is_not_there_or_not_wanted(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "did you mean 'alpaca-gpt4'" in refused("gate-taylor", data="alpaca-gtp4")
    recipe = written(tmp_path, NOTHING)
    assert "uses no data" in refused(recipe)
    trained = written(tmp_path, "stages: [{recover: {}}]", "other.yaml")
    assert "needs data; give --data" in refused(trained, data=None)


@pytest.fixture
def broken(tiny_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """broken(config=..., tensors=..., raw=...): a copy of the tiny model after the given changes."""

    def _broken(
        config: Callable[[dict[str, Any]], None] | None = None,
        tensors: Callable[[dict[str, torch.Tensor]], None] | None = None,
        raw: Callable[[Path], None] | None = None,
    ) -> Path:
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tiny_folder, folder)
        if config:
            values = json.loads((folder / "config.json").read_text())
            config(values)
            (folder / "config.json").write_text(json.dumps(values))
        if tensors:
            stored = load_file(folder / "model.safetensors")
            tensors(stored)
            save_file(stored, folder / "model.safetensors", {"format": "pt"})
        if raw:
            raw(folder)
        return folder

    return _broken


UP = "model.layers.1.mlp.up_proj.weight"


def test_bad_models_are_refused_by_their_headers(
    refused: Callable[..., str], broken: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = written(tmp_path, NOTHING)
    check = lambda model: refused(recipe, model=model, data=None)  # noqa: E731
    assert f"missing: {UP}" in check(broken(tensors=lambda stored: stored.pop(UP)))
    assert f"wrong shape: {UP} [47, 32] instead of [48, 32]" in check(
        broken(tensors=lambda t: t.update({UP: t[UP][:47].clone()}))
    )
    half = lambda folder: os.truncate(folder / "model.safetensors", 9000)  # noqa: E731
    assert "it is truncated" in check(broken(raw=half))
    pickled = lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin")  # noqa: E731
    assert "pickled weights" in check(broken(raw=pickled))
    assert "auto_map" in check(
        broken(config=lambda values: values.update(model_type="mine", auto_map={"AutoConfig": "a.B"}))
    )
    codegen = lambda folder: CodeGenConfig(n_layer=1, n_embd=8, n_head=2, rotary_dim=4).save_pretrained(folder)  # noqa: E731
    assert "does not fit its config.json" in check(broken(raw=codegen))
    whole = lambda folder: CodeGenForCausalLM(CodeGenConfig.from_pretrained(folder)).save_pretrained(folder)  # noqa: E731
    assert "no architecture describes model_type 'codegen'" in check(
        broken(raw=lambda folder: (codegen(folder), whole(folder)))
    )
    only_config = broken() / "config.json"
    assert "a config.json is enough for `compresso plan`" in check(only_config)
    assert "does not exist" in check(tmp_path / "nowhere" / "at" / "all")


def test_devices_that_are_not_there(refused: Callable[..., str]) -> None:
    assert "is not a device name" in refused("gate-taylor", "--device", "gpu", code=3)
    assert "--device cpu" in refused("gate-taylor", "--device", "cuda:17", code=3)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (Interrupted(signal.SIGTERM, "there"), 143, "stopped by SIGTERM; repeat the command with --resume to go on"),
        (Interrupted(signal.SIGINT, "there"), 130, "stopped by SIGINT; repeat the command with --resume to go on"),
        (Interrupted(signal.SIGTERM, None), 143, "stopped by SIGTERM"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (torch.OutOfMemoryError("CUDA out of memory."), 3, "ResourceError: out of memory (CUDA out of memory.)"),
        (MemoryError(), 3, "ResourceError: out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 7 bytes"), 3, "ResourceError: out of memory"),
        (ResourceError("disk full"), 3, "ResourceError: disk full"),
        (OSError(errno.ENOSPC, "No space left on device"), 3, "ResourceError: [Errno 28] No space left"),
        (NumericError("loss is nan"), 4, "NumericError: loss is nan"),
    ],
)
def test_exit_codes(
    call: Call, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(inspect, "inspect", fails)
    found, out, text = call("inspect", tiny_folder)
    assert (found, out) == (code, "")
    assert message in text
    assert len(text.splitlines()) == 1


def test_what_nobody_foresaw_keeps_its_traceback(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(inspect, "inspect", fails)
    with pytest.raises(ZeroDivisionError):
        cli.main(["inspect", str(tiny_folder)])


def test_signals_are_left_as_they_were(call: Call) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGPIPE)
    call("--version")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGPIPE)) == before


def test_help_of_every_verb_shows_an_example(call: Call) -> None:
    code, out, error = call("--help")
    assert (code, error) == (0, "")
    assert all(verb in out for verb in VERBS)
    assert call()[1] == out
    for verb in VERBS:
        code, text, _ = call(verb, "--help")
        assert code == 0
        assert f"Example: compresso {verb}" in text
    code, _, error = call("prune", "model")
    assert code == 2
    assert error.startswith("usage: No such command 'prune'")
    assert "Missing option '--model'" in call("run", "compresso")[2]


def test_help_of_evaluate_speaks_of_no_recipe(call: Call) -> None:
    _, text, _ = call("evaluate", "--help")
    assert "What the model was trained for" in text and "recipe" not in text


@pytest.mark.parametrize("verb", ["evaluate", "measure", "latency", "compare"])
def test_help_says_that_a_report_is_replaced(verb: str, call: Call) -> None:
    """What these commands wrote, they write anew without being asked to."""
    _, text, _ = call(verb, "--help")
    assert "lies there is replaced" in " ".join(text.replace("│", " ").split())


def test_help_imports_nothing_heavy() -> None:
    """A typo or a look at an option costs no import of torch."""
    program = (
        "import sys\nfrom compresso.cli import main\ntry:\n    main(sys.argv[1:])\nfinally:\n    print(*sys.modules)"
    )
    for arguments in (["--help"], ["run", "--help"], ["prune"], ["--version"]):
        ran = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
        imported = ran.stdout.splitlines()[-1].split()
        assert "compresso.cli" in imported
        assert {"torch", "transformers", "numpy", "peft"}.isdisjoint(imported), arguments


@pytest.mark.slow
@pytest.mark.usefixtures("reads_weights", "quick_reopening")
def test_old_options_work_with_a_warning(call: Call, tiny_folder: Path, tmp_path: Path) -> None:
    recipe = written(tmp_path, NOTHING)
    start = ("run", recipe, "--model", tiny_folder, "--output", tmp_path / "out")
    assert call(*start)[0] == 0
    code, _, error = call(*start)
    assert code == 2 and "add --overwrite to replace what a run wrote" in error
    code, _, error = call(*start, "--force")
    assert (code, error) == (
        0,
        "warning: --force is deprecated and goes with compresso 0.3; give --overwrite, --allow-collapsed or both\n",
    )
    plan = ("plan", recipe, "--model", tiny_folder, "--json")
    new = call(*plan, "--target", "awq:g32")
    old = call(*plan, "--for", "awq:g32")
    assert old[:2] == new[:2] and new[2] == ""
    assert old[2] == "warning: --for is deprecated and goes with compresso 0.3; give --target\n"
    code, _, error = call(*start, "--overwrite", "--stream")
    assert code == 2 and error.startswith("warning: --stream is deprecated and goes with compresso 0.3; give --offload")
    assert "cannot be offloaded" in error


def test_version(call: Call) -> None:
    import compresso

    assert call("--version") == (0, f"compresso {compresso.__version__}\n", "")


def test_inspect_json_is_the_contract(call: Call, tiny_folder: Path) -> None:
    code, out, error = call("inspect", tiny_folder / "config.json", "--json")
    assert (code, error) == (0, "")
    facts = json.loads(out)
    assert set(facts) == {"architecture", "parameters", "axes", "macs_per_token", "kv_bytes_per_token"}
    attention, mlp = 2 * 32 * 64 + 2 * 32 * 32, 3 * 32 * 48
    blocks = 3 * (attention + mlp)
    assert facts["architecture"] == "llama"
    assert facts["parameters"] == {
        "total": blocks + 1024 * 32 + 7 * 32,
        "blocks": blocks,
        "embeddings": 1024 * 32,
        "norms": 7 * 32,
    }
    assert facts["macs_per_token"] == blocks + 1024 * 32
    assert facts["kv_bytes_per_token"] == 3 * 2 * 32 * 2
    assert all(set(axis) == {"kind", "count", "size", "parameters_per_unit"} for axis in facts["axes"])
    by_kind = {axis["kind"]: axis for axis in facts["axes"]}
    assert by_kind["head"] == {"kind": "head", "count": 3, "size": 4, "parameters_per_unit": attention // 4}
    assert by_kind["channel"] == {"kind": "channel", "count": 3, "size": 48, "parameters_per_unit": 3 * 32}
    assert "What can be removed" in call("inspect", tiny_folder)[1]


def test_plan_json_is_the_contract(call: Call, tiny_folder: Path) -> None:
    code, out, error = call(
        "plan", "compresso", "--model", tiny_folder / "config.json", "--keep", 0.5, "--max-steps", 8, "--json"
    )
    assert (code, error) == (0, "")
    facts = json.loads(out)
    dense = json.loads(call("inspect", tiny_folder, "--json")[1])
    assert facts["before"] == {key: dense[key] for key in ("parameters", "macs_per_token", "kv_bytes_per_token")}
    assert facts["after"].keys() == facts["before"].keys()
    assert facts["after"]["parameters"]["blocks"] <= 0.5 * dense["parameters"]["blocks"]
    assert facts["after"]["parameters"]["blocks"] >= 0.45 * dense["parameters"]["blocks"]
    assert facts["shapes"]["layers.0.channels"][1] == 48
    assert set(facts["layouts"]) == {"uniform", "padded", "native"}
    learn, recover = facts["training"]
    assert learn["updates"] == recover["updates"] == 8
    assert learn["tokens_at_most"] == 8 * 16 * 512
    assert learn["trainable"]["gates"] == 3 * (4 + 48)
    assert learn["flops_at_most"] == 4 * dense["macs_per_token"] * learn["tokens_at_most"]
    assert learn["seconds_estimated"] > 0
    memory = learn["memory_bytes_estimated"]
    assert memory["total"] == memory["weights"] + memory["trained"] + memory["activations"]
    assert recover["trainable"]["lora"] < learn["trainable"]["lora"]  # it trains the smaller model
    assert facts["weight_bytes"]["before"] == 4 * dense["parameters"]["total"]


def test_plan_counts_the_teacher_of_distillation(call: Call, tiny_folder: Path) -> None:
    dense = json.loads(call("inspect", tiny_folder, "--json")[1])
    arguments = ("plan", "gate-taylor/distill", "--model", tiny_folder, "--max-steps", 8, "--json")
    found = [json.loads(call(*arguments, "--set", f"stages.distill.train={train}")[1]) for train in ("lora", "all")]
    (lora,), (everything,) = (facts["training"] for facts in found)
    left = found[0]["after"]
    for one, per_mac in ((lora, 4), (everything, 6)):
        assert (
            one["flops_at_most"]
            == (per_mac * left["macs_per_token"] + 2 * dense["macs_per_token"]) * one["tokens_at_most"]
        )
        assert one["memory_bytes_estimated"]["weights"] == 4 * (
            left["parameters"]["total"] + dense["parameters"]["total"]
        )
    assert everything["trainable"] == {"all": left["parameters"]["total"]}
    assert list(lora["trainable"]) == ["lora"]


def test_plan_says_null_where_the_data_decides(call: Call, tiny_folder: Path) -> None:
    facts = json.loads(call("plan", "compresso/paper", "--model", tiny_folder, "--json")[1])
    assert facts["training"][0]["updates"] is facts["training"][0]["seconds_estimated"] is None
    code, out, _ = call("plan", "compresso/paper", "--model", tiny_folder)
    assert code == 0
    assert "estimated" in out


def test_plan_refuses_what_run_refuses(call: Call, tiny_folder: Path) -> None:
    code, _, error = call("plan", "compresso", "--model", tiny_folder, "--set", "stages.learn_gates.batch=6")
    assert code == 2
    assert "cannot be split" in error


def test_budgets_reach_the_recipe(call: Call, tiny_folder: Path) -> None:
    dense = json.loads(call("inspect", tiny_folder, "--json")[1])
    facts = json.loads(call("plan", "gate-taylor", "--model", tiny_folder, "--parameters", "0.05M", "--json")[1])
    assert 48_000 < facts["after"]["parameters"]["total"] <= 50_000
    facts = json.loads(call("plan", "gate-taylor", "--model", tiny_folder, "--macs", "1.25", "--json")[1])
    assert 0.75 < facts["after"]["macs_per_token"] / dense["macs_per_token"] <= 0.8


def test_catalogue(call: Call) -> None:
    code, out, _ = call("methods", "--json")
    assert code == 0
    rows = {row["name"]: row for row in json.loads(out, parse_constant=pytest.fail)}
    assert rows["learn_gates"]["knobs"]["keep"] == 0.7
    assert all(row["when"] and row["failures"] and row["title"] for row in rows.values())
    assert json.loads(call("methods", "recover", "--json")[1])[0]["name"] == "recover"
    assert "mask_lr" in call("methods", "learn_gates")[1]
    assert {row["model"] for row in rows["gate_taylor"]["measured"]} >= {"nano"}
    assert rows["recover"]["measured"] == []
    assert "Measured" in call("methods", "gate_taylor")[1] and "Measured" not in call("methods", "recover")[1]
    assert rows["wanda"]["knobs"]["where"] == {"layers": None, "modules": ["*"], "ignore": []}
    assert "calibration.examples" in call("methods", "wanda")[1]
    shown = call("methods", "bonsai")[1]  # as a recipe would say it
    assert "[head, query, channel]" in shown and "{head: 1, channel: 1}" in shown
    assert "did you mean 'recover'" in call("methods", "recver")[2]
    assert "compresso/paper" in call("recipes")[1]
    assert "did you mean 'compresso/paper'" in call("recipes", "compresso/papr")[2]


def test_a_printed_recipe_can_be_run(call: Call, tmp_path: Path, tiny_folder: Path) -> None:
    path = written(tmp_path, call("recipes", "compresso/paper")[1])
    assert call("plan", path, "--model", tiny_folder)[0] == 0


def test_nothing_but_text_goes_to_what_is_no_terminal(call: Call, tiny_folder: Path) -> None:
    for arguments in (
        ("inspect", tiny_folder),
        ("methods",),
        ("recipes",),
        ("plan", "gate-taylor", "--model", tiny_folder),
    ):
        assert "\x1b" not in call(*arguments)[1]


@pytest.mark.usefixtures("reads_weights", "quick_reopening")
def test_run_prints_where_the_result_is_and_json_prints_nothing_else(
    call: Call, tiny_folder: Path, tmp_path: Path
) -> None:
    recipe = written(tmp_path, NOTHING)
    code, out, error = call("run", recipe, "--model", tiny_folder, "--output", tmp_path / "out")
    assert (code, error) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["parameters", "bytes", "held", "decoding", "written"]
    assert "compresso.load(" in out and "report.html" in out and "README.md" in out
    code, out, error = call("run", recipe, "--model", tiny_folder, "--output", tmp_path / "again", "--json")
    assert code == 0
    assert json.loads(out, parse_constant=pytest.fail) == json.loads((tmp_path / "again" / "records.json").read_text())


@pytest.mark.slow
@pytest.mark.usefixtures("reads_weights")
def test_the_whole_way_with_a_fresh_process(call: Call, tiny_folder: Path, instructions: Path, tmp_path: Path) -> None:
    """Without short cuts: the checkpoint is reopened in a process of its own."""
    sets = [
        part
        for one in (*SHORT, "stages.gate_taylor.batches=1", "stages.gate_taylor.batch=4")
        for part in ("--set", one)
    ]
    code, _, error = call(
        "run",
        "gate-taylor",
        "--model",
        tiny_folder,
        "--data",
        instructions,
        "--output",
        tmp_path / "out",
        "--max-steps",
        1,
        *sets,
    )
    assert code == 0, error
    assert json.loads((tmp_path / "out" / "records.json").read_text())["reopened_max_abs_difference"] <= 1e-4
    assert "recover" in error  # progress, on stderr


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError("11008 requested and 2880 written"), 3, "11008 requested and 2880 written (OSError)"),
        (OSError(), 3, "an input or output error without a reason"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/gone"), 2, "/gone: No such file or directory"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/closed"),
            2,
            "/closed: Permission denied; check the path",
        ),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "/loop"), 2, "/loop: Too many levels"),
        (OSError(errno.EMFILE, "Too many open files"), 3, "Too many open files; free"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), 3, "out of memory"),
    ],
)
def test_errors_of_the_system_are_one_line(
    error: Exception, code: int, said: str, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(inspect, "inspect", fail)
    found, _, shown = call("inspect", "m")
    assert found == code
    assert said in shown
    assert len(shown.splitlines()) == 1
