"""A tiny LLaMA with the embedded model's tokenizer, a few instructions, and runs of recipes that tests share because
they cost seconds.
"""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, get_args

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from compresso import cli
from compresso.core.budget import Budget
from compresso.core.quantities import Counted
from compresso.data import nano
from compresso.engines import transformers_4
from compresso.engines import vllm as vllm_engine
from compresso.errors import ExportError, ResourceError
from compresso.runner import final_evaluation
from compresso.runner.options import with_options
from compresso.runner.recipe import build, names, read, task_of, with_knob
from compresso.runner.run import Result, run
from compresso.stage import ChecksModel, Learns, Shrinks
from compresso.tasks.base import DEFAULT
from tests import fresh
from tests.last_lines import (  # noqa: F401  hooks of pytest: what a run of the tests ends with
    pytest_collectreport,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)

CANARY = "canary-of-the-environment"
"""A secret in the environment of every test: it must not reach a file."""
SHORT = ("data.held=4", "data.prompt=false", "data.pack=false", "data.limit=40")
"""Overrides that make any shipped recipe quick on these instructions."""

_STAGES = {name: dict(build(read(name)).stages) for name in names()}
ONE_SHOT = [
    name
    for name, made in _STAGES.items()
    if all(isinstance(one, ChecksModel) and not isinstance(one, Learns | Shrinks) for one in made.values())
]
"""Shipped recipes that change weights in one pass and no shapes."""


def _counts(budget: Budget | None) -> bool:
    """Whether a budget is a share of what follows from shapes."""
    return budget is not None and budget.of in get_args(Counted)


OF_OTHER_MODELS = (
    "moe/expert-drop",
    "moe/expert-drop-global",
    "moe/expert-drop-lora",
    "moe/layer-drop",
    "moe/layer-drop-int4",
    "moe/reap-50-router",
    "moe/slim-2-4",
    "segmenter",
    "segmenter/teacher",
)
"""Recipes for mixtures and for pictures, which the models here are not; tests of their stages and tasks run those."""
FOR_ANY_MODEL = [
    name
    for name, stages in _STAGES.items()
    if task_of(read(name)).name == DEFAULT
    and name not in OF_OTHER_MODELS
    and any(isinstance(stage, Shrinks) and _counts(stage.budget()) for stage in stages.values())
]
"""Shipped recipes of causal language models with a budget that shapes alone can meet; others meet no size, have a ratio
of the units of certain layers (published sizes of certain models), or count in what a run measures.
"""


def _first_of_each_list(recipes: Iterable[str], without: Iterable[str] = ()) -> list[str]:
    """The first recipe of each distinct list of stages, but for lists that recipes of `without` have."""
    firsts: dict[tuple[str, ...], str] = {}
    for name in recipes:
        firsts.setdefault(tuple(_STAGES[name]), name)
    known = {tuple(_STAGES[name]) for name in without}
    return [name for stages, name in firsts.items() if stages not in known]


RUN = _first_of_each_list(FOR_ANY_MODEL)
"""Recipes with a budget that are run, one of each list of stages: the others differ from it in knobs, which tests of
their methods turn. All are built and acted out in tests/recipes/test_recipes.py.
"""
RUN_WITHOUT_BUDGET = _first_of_each_list(_STAGES, without=[*FOR_ANY_MODEL, *ONE_SHOT, *OF_OTHER_MODELS])
"""Recipes that are run beside those and beside the one-shot recipes, so that every list of stages is."""

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")  # a busy machine is no fault of the code
os.environ["COMPRESSO_TEST_SECRET"] = CANARY
os.fsync = lambda *_: None  # a tenth of the time, and no test cuts the power; those of atomic writes count the calls
subprocess.run = fresh.run  # processes that open a checkpoint are forked: tests start dozens
# a third of a short run; how speed is taken is asked in tests/metrics/test_latency.py
final_evaluation.SPEED_NEW, final_evaluation.SPEED_ROUNDS = 4, 2
transformers_logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied LLaMA: hidden 32, 3 layers, 4 key/value heads with 2 query heads each, 48 channels, 1024 tokens."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    generator = torch.Generator().manual_seed(5)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.5 * parameter.shape[1] ** -0.5, generator=generator)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(nano.path()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 short Alpaca rows."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {"instruction": f"Count to {n}.", "input": "", "output": " ".join(str(i) for i in range(1, n % 7 + 2))}
        for n in range(48)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reopen_here(folder: Path, model: PreTrainedModel, ids: torch.Tensor, atol: float) -> float:
    """What `reopen_and_compare` does, in this process: seconds are saved, and one test goes the long way."""
    dtype = getattr(torch, json.loads((folder / "config.json").read_text())["dtype"])
    live = copy.deepcopy(model).eval().cpu()
    for parameter in live.parameters():
        parameter.data = parameter.data.to(dtype).float()
    stored = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        worst = float((stored(input_ids=ids).logits - live(input_ids=ids).logits).abs().max())
    if not worst <= atol:
        raise ExportError(f"logits differ by {worst}")
    return worst


@pytest.fixture(autouse=True)
def no_engines(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs by command ask no engine, which takes half a minute; a test marked `engines` does."""
    if request.node.get_closest_marker("engines") is None:
        monkeypatch.setattr(sys.modules["compresso.runner.execution"], "parity_records", lambda folder: [])


@pytest.fixture(autouse=True)
def no_picture_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do runs of pictures open both models in processes of their own, but in such tests."""

    def left_out(model: PreTrainedModel) -> NoReturn:
        raise ResourceError("left out of this test")

    if request.node.get_closest_marker("engines") is None:
        monkeypatch.setattr("compresso.runner.final_evaluation.picture_memory", left_out)


@pytest.fixture(autouse=True)
def no_vllm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM, which takes 20 seconds to open anything, is not installed but for tests marked `vllm`."""
    if request.node.get_closest_marker("vllm") is None:
        monkeypatch.setattr(vllm_engine, "missing", lambda: "vllm is not installed")


@pytest.fixture(autouse=True)
def no_transformers_4(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 4.57, a process of five seconds, is not installed but for tests marked `transformers_4`."""
    if request.node.get_closest_marker("transformers_4") is None:
        monkeypatch.setattr(transformers_4, "missing", lambda: "transformers 4.57 is not installed")


@pytest.fixture
def real_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process is forked in the place of one that is started, see `tests/fresh.py`."""
    monkeypatch.setattr(subprocess, "run", fresh.REAL)


@pytest.fixture
def quick_reopening(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints are reopened in this process."""
    monkeypatch.setattr("compresso.runner.output.reopen_and_compare", reopen_here)


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports have tables in the place of charts, as where altair is not installed; a third of a short run's time."""
    monkeypatch.setattr("compresso.report.charts.can_draw", lambda: False)


Ran = Callable[..., Result]


@pytest.fixture(scope="session")
def ran(tiny_folder: Path, instructions: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """ran(recipe, layout="auto", seed=0, sets=(), **options): the result of a shortened run;
    equal arguments share one.
    """
    done: dict[Any, Result] = {}

    def once(
        recipe: str, *, layout: str = "auto", seed: int = 0, sets: tuple[str, ...] = (), copy: int = 0, **options: Any
    ) -> Result:
        key = (recipe, layout, seed, sets, copy, *sorted(options.items()))
        if key not in done:
            steps = options.pop("max_steps", 3)
            raw = with_options(recipe, model=str(tiny_folder), sets=[*SHORT, *sets], **options)
            raw = with_knob(raw, "max_steps", steps, required=False)
            output = tmp_path_factory.mktemp("runs") / "out"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("compresso.runner.output.reopen_and_compare", reopen_here)
                done[key] = run(raw, tiny_folder, instructions, output=output, layout=layout, seed=seed, quiet=True)
        return done[key]

    return once


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Call:
    """call(*arguments): exit code, stdout and stderr of the command line."""

    def _call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(one) for one in arguments])
        written = capfd.readouterr()
        return int(stop.value.code or 0), written.out, written.err

    return _call


@pytest.fixture(scope="session")
def served() -> Iterator[subprocess.Popen[str]]:
    """The process that forks a child for each command line."""
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root / "src"), str(root), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", str(root / "tests" / "forked.py")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        yield process
        assert process.stdin is not None
        process.stdin.close()


Forked = Callable[..., tuple[int, str]]


@pytest.fixture
def forked(served: subprocess.Popen[str], tmp_path: Path) -> Forked:
    """forked(arguments, event="", phase="", at=0): exit code and output of a command line with an event in it, see
    `tests/forked.py`.
    """

    def _forked(arguments: list[str], event: str = "", phase: str = "", at: int = 0) -> tuple[int, str]:
        log = tmp_path / "log"
        job = {"arguments": arguments, "log": str(log), "event": event, "phase": phase, "at": at}
        assert served.stdin is not None
        assert served.stdout is not None
        served.stdin.write(json.dumps(job) + "\n")
        served.stdin.flush()
        code = int(served.stdout.readline())
        return code, log.read_text()

    return _forked


def work_of(output: Path) -> Path:
    """The work folder of an output."""
    return output.with_name(output.name + ".partial")
