"""Damaged files, by the hundred: whatever a config, tokenizer, plan, report or recipe holds, a command ends with a
documented exit code, in one line if it failed, and leaves nothing behind.
"""

import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from compresso.engines.parity import Parity
from tests.conftest import SHORT, Call, Ran
from tests.mutations import damaged

SECONDS = 30
"""Before a command counts as hanging; it takes about one."""
MOST_BYTES = 24 * 10**9
"""Of data: a number in a file must not fill the memory."""

MODEL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
RESULT_FILES = ("plan.json", "records.json", "config.json")
ON_MODELS = (
    ("inspect", "{model}"),
    ("plan", "magnitude-structured", "--model", "{model}", "--keep", "0.7"),
    ("run", "magnitude/50", "--model", "{model}", "--output", "{out}/new", "--no-verify"),
    ("run", "gate-taylor", "--model", "{model}", "--data", "{rows}", "--output", "{out}/new", "--no-verify",
     "--max-steps", "1", "--allow-collapsed", "--set", "stages.gate_taylor.n=4",
     *(word for one in SHORT for word in ("--set", one))),
    ("verify", "{model}"),
    ("export", "{model}", "--format", "gguf", "--dtype", "f32", "--output", "{out}/new.gguf"),
    ("export", "{model}", "--format", "vllm-deci", "--output", "{out}/new"),
    ("evaluate", "{model}", "--corpus", "{text}", "--protocol", "llm-pruner", "--output", "{out}/new.json"),
)  # fmt: skip
ON_RESULTS = (
    ("compare", "{result}", "--output", "{out}/new.html"),
    ("compare", "{result}", "{report}", "--output", "{out}/new.html"),
    ("evaluate", "{result}", "--corpus", "{text}", "--protocol", "llm-pruner"),
    ("verify", "{result}"),
)
ON_REPORTS = (
    ("compare", "{report}", "--output", "{out}/new.html"),
    ("evaluate", "{model}", "--corpus", "{text}", "--protocol", "llm-pruner", "--output", "{report}"),
)
ON_RECIPES = (
    ("plan", "{recipe}", "--model", "{model}"),
    ("recipes", "{recipe}"),
    ("run", "{recipe}", "--model", "{model}", "--data", "{rows}", "--output", "{out}/new", "--no-verify",
     "--max-steps", "1", "--allow-collapsed"),
)  # fmt: skip
KINDS = {
    "model": (ON_MODELS, tuple(("model", name) for name in MODEL_FILES), 5),
    "result": (ON_RESULTS, tuple(("result", name) for name in RESULT_FILES), 3),
    "report": (ON_REPORTS, (("report", ""),), 1),
    "recipe": (ON_RECIPES, (("recipe", ""), ("result", "recipe.yaml")), 2),
}
"""Commands, the files that are damaged before them, and the share of all tries."""
FAST, ALL = 60, 600
_SHARES = [kind for kind, (*_, share) in KINDS.items() for _ in range(share)]


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, instructions: Path, ran: Ran, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each input, undamaged."""
    root = tmp_path_factory.mktemp("whole")
    result = ran("gate-taylor", max_steps=1, keep=0.7)
    (root / "text.txt").write_text("\n\n".join(f"Count to {n} and back, slowly. " * 40 for n in range(8)))
    report = Path(__file__).parent / "report" / "release_0_1" / "evaluate.json"
    recipe = root / "recipe.yaml"
    recipe.write_text(
        "name: mine\ntask: causal-lm\ndata: {max_length: 64, held: 4, prompt: false}\nstages:\n"
        "  - gate_taylor: {keep: 0.7, kinds: [head, channel], n: 4, floor: {channel: 4}}\n"
        "  - recover: {rank: 2, steps: 1, batch: 4, micro_batch: 4, targets: [q_proj, up_proj]}\n"
    )
    return {
        "model": tiny_folder,
        "result": result.folder,
        "rows": instructions,
        "text": root / "text.txt",
        "report": report,
        "recipe": recipe,
    }


@contextmanager
def bounded() -> Iterator[None]:
    """Neither time nor memory without end."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not done after {SECONDS} s")

    before, limits = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_DATA)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, limits[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_DATA, limits)


Tried = Callable[[int], None]


@pytest.fixture
def tried(call: Call, whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tried:
    """tried(seed): one damaged file, one command, judged."""
    asked = [Parity("nobody", "not checked", "no process is started here")]
    monkeypatch.setattr(sys.modules["compresso.engines.verify"], "parities", lambda *_: asked)
    monkeypatch.setattr(sys.modules["compresso.runner.execution"], "parity_records", lambda folder: [])

    def one(seed: int) -> None:
        draw = random.Random(seed)
        commands, files, _ = KINDS[draw.choice(_SHARES)]
        which, name = draw.choice(files)
        shutil.rmtree(tmp_path)
        for folder in ("temporary", "out", "given"):
            (tmp_path / folder).mkdir(parents=True)
        original = whole[which]
        given = tmp_path / "given" / original.name
        if original.is_dir():
            shutil.copytree(original, given)
        else:
            given.write_bytes(original.read_bytes())
        file = given / name if name else given
        file.write_bytes(damaged(file.read_bytes(), draw, of_yaml=file.suffix == ".yaml"))
        here = whole | {which: given, "out": tmp_path / "out"} | ({"recipe": file} if file.suffix == ".yaml" else {})
        command = [word.format_map(here) for word in draw.choice(commands)]
        before = file.read_bytes()
        with bounded(), monkeypatch.context() as patch:
            patch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
            code, out, error = call(*command)
        said = [line for line in error.splitlines() if not PROGRESS.match(line)]
        about = f"seed {seed}: {name or which} before {' '.join(command)}: exit {code}\n{error[-2000:]}"
        assert code in (0, 2, 3, 4), about
        assert "Traceback" not in error + out, about
        assert not os.listdir(tmp_path / "temporary"), about  # noqa: PTH208
        if code:
            assert len(said) == 1 and len(said[0]) < 1500, about
            left = [one for one in os.listdir(tmp_path / "out") if code == 2 or one != "new.partial"]  # noqa: PTH208
            assert not left, about  # stages that ended before a numeric failure stay for a resume
            assert file.read_bytes() == before, about

    return one


PROGRESS = re.compile(r"warning: |[\w ]+ \d+/\d+ |\[transformers\] ")
"""What lines on stderr begin with that are no errors."""


@pytest.mark.usefixtures("quick_reopening")
@pytest.mark.parametrize("seed", range(FAST))
def test_a_damaged_file_is_said_in_a_line(seed: int, tried: Tried) -> None:
    tried(seed)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_reopening")
@pytest.mark.parametrize("part", range(9))
def test_damaged_files_by_the_hundred(part: int, tried: Tried) -> None:
    faults: list[str] = []
    for seed in range(FAST + part * 60, FAST + (part + 1) * 60):
        try:
            tried(seed)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            faults.append(f"seed {seed}: {type(error).__name__} {error}")
    assert not faults, "\n\n".join(faults)
