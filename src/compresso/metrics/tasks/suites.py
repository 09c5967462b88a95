"""The tasks and suites by name, each with the harness's own YAML, the number of shots, and the local file that can
stand in for the hub.

The subjects of mmlu and bbh are read from the folder of the installed harness, and those of the world from compresso's:
no list here can fall behind. What a score of a suite is: over tasks (every task counts the same) or over items.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from compresso.data import world
from compresso.errors import DataError, ResourceError, nearest
from compresso.metrics.tasks.copies import Copy

SUITES = ("commonsense", "reading", "mmlu", "bbh", "world")
WORLD_YAMLS = Path(__file__).parent / "world"
_STRIPPED = {
    "filter_list": [{"name": "stripped", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}]
}
_ARC_REMARK = "whole split; choices are labelled A, B, ... in every row, which no request shows"


@dataclass(frozen=True, slots=True)
class Bench:
    """A task.

    Args:
        name: as in measurements; the harness may call it differently.
        yaml: its YAML, below the harness's folder of tasks or that of the world.
        shots: unless another number is asked for.
        hub: id of its data set on the hub; None for one that is embedded, or that the hub does not give away.
        copy: the local file that can stand in; None for one that is embedded.
        changes: keys of the YAML that are set otherwise.
    """

    name: str
    yaml: str
    shots: int = 0
    hub: str | None = None
    copy: Copy | None = None
    changes: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def path(self) -> Path:
        """The YAML's place.

        Raises:
            ResourceError: the harness is not installed.
        """
        return (harness_tasks() if self.copy else WORLD_YAMLS) / self.yaml


@dataclass(frozen=True, slots=True)
class Suite:
    """Tasks with a score in common; a task that was asked for by itself is a suite without a name."""

    name: str | None
    benches: tuple[Bench, ...]
    weights: Literal["tasks", "items"] = "tasks"


def harness_tasks() -> Path:
    """The folder of YAMLs in the installed harness, found without importing it.

    Raises:
        ResourceError: there is none.
    """
    spec = find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ResourceError("tasks are run by lm_eval, which is not installed; pip install 'compresso-llm[evaluate]'")
    return Path(next(iter(spec.submodule_search_locations))) / "tasks"


COMMONSENSE = (
    Bench(
        "piqa",
        "piqa/piqa.yaml",
        hub="baber/piqa",
        copy=Copy({"validation": "piqa_validation.jsonl.gz"}, ("goal", "sol1", "sol2", "label"), "whole split"),
    ),
    Bench(
        "hellaswag",
        "hellaswag/hellaswag.yaml",
        hub="Rowan/hellaswag",
        copy=Copy(
            {"validation": "hellaswag_validation_1000.jsonl.gz"},
            ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
            "1,000 rows of 10,042",
        ),
    ),
    Bench(
        "winogrande",
        "winogrande/default.yaml",
        hub="allenai/winogrande",
        copy=Copy(
            {"validation": "winogrande_xl_validation.jsonl.gz"},
            ("sentence", "option1", "option2", "answer"),
            "whole split; the blank was rebuilt from the two sentences that differ in it",
        ),
    ),
    Bench(
        "arc_easy",
        "arc/arc_easy.yaml",
        hub="allenai/ai2_arc",
        copy=Copy({"test": "arc_easy_test.jsonl.gz"}, ("question", "choices", "answerKey"), _ARC_REMARK),
    ),
    Bench(
        "arc_challenge",
        "arc/arc_challenge.yaml",
        hub="allenai/ai2_arc",
        copy=Copy({"test": "arc_challenge_test.jsonl.gz"}, ("question", "choices", "answerKey"), _ARC_REMARK),
    ),
    Bench(
        "openbookqa",
        "openbookqa/openbookqa.yaml",
        hub="allenai/openbookqa",
        copy=Copy({"test": "openbookqa_test.jsonl.gz"}, ("question_stem", "choices", "answerKey"), "whole split"),
    ),
)
STORYCLOZE = Bench(
    "storycloze",
    "storycloze/storycloze_2018.yaml",
    copy=Copy(
        {"validation": "storycloze_2018_validation.jsonl.gz"},
        (*(f"input_sentence_{i}" for i in (1, 2, 3, 4)), "sentence_quiz1", "sentence_quiz2", "answer_right_ending"),
        "as given; its authors send it on request",
    ),
)
LAMBADA = Bench(
    "lambada",
    "lambada/lambada_openai.yaml",
    hub="EleutherAI/lambada_openai",
    copy=Copy({"test": "lambada_openai_2000.jsonl.gz"}, ("text",), "first 2,000 rows of 5,153"),
)
ALONE = (STORYCLOZE, LAMBADA)
"""Tasks of no suite that always has them."""
READING = (
    Bench(
        "boolq",
        "super_glue/boolq/default.yaml",
        hub="aps/super_glue",
        copy=Copy(
            {"validation": "boolq_validation_2000.jsonl.gz"},
            ("question", "passage", "label"),
            "first 2,000 rows of 3,270",
        ),
    ),
    Bench(
        "race",
        "race/race.yaml",
        hub="EleutherAI/race",
        copy=Copy(
            {"test": "race_high_500.jsonl.gz"},
            ("article", "question", "options", "answer"),
            "500 questions, each alone with its article; the original shows an article's other questions, answered,"
            " first; split unknown",
            layout="race",
        ),
    ),
)


def suites_of(names: str | Sequence[str], data_root: Path | None = None) -> tuple[Suite, ...]:
    """The suites and tasks with these names, in order, no task twice.

    Args:
        names: one name, or several; of suites or tasks.
        data_root: where local files lie; storycloze belongs to `commonsense` if its file is there.

    Raises:
        DataError: no name, or one that is not known, with the nearest.
        ResourceError: lm_eval is not installed.
    """
    asked = [names] if isinstance(names, str) else list(names)
    if not asked:
        raise DataError(f"no task was named; known suites: {', '.join(SUITES)}")
    suites = _suites(data_root)
    tasks = _benches(suites)
    chosen: list[Suite] = []
    seen: set[str] = set()
    for name in asked:
        if name not in suites and name not in tasks:
            raise DataError(f"no task or suite '{name}'; {nearest(name, [*suites, *tasks])}")
        suite = suites.get(name) or Suite(None, (tasks[name],))
        if twice := [bench.name for bench in suite.benches if bench.name in seen]:
            raise DataError(f"task '{twice[0]}' is asked for twice in {', '.join(asked)}; name it, or its suite, once")
        seen.update(bench.name for bench in suite.benches)
        chosen.append(suite)
    return tuple(chosen)


def check_suite(name: str, others: Sequence[str] = ()) -> None:
    """Raise DataError, with the nearest suite, where nothing goes by the name given for one; a single task may.

    others: names of suites that are no tasks, which a mistyped one may have meant.
    """
    suites = _suites(None)
    if name not in suites and name not in _benches(suites):
        raise DataError(f"--suite {name!r} is unknown; {nearest(name, (*suites, *others))}")


def _benches(suites: Mapping[str, Suite]) -> dict[str, Bench]:
    """Every task by its name."""
    return {bench.name: bench for suite in (*suites.values(), Suite(None, ALONE)) for bench in suite.benches}


def _suites(data_root: Path | None) -> dict[str, Suite]:
    story = STORYCLOZE.copy is not None and data_root is not None and STORYCLOZE.copy.missing(data_root) is None
    return {
        "commonsense": Suite("commonsense", (*COMMONSENSE, STORYCLOZE) if story else COMMONSENSE),
        "reading": Suite("reading", READING),
        "mmlu": Suite(
            "mmlu", tuple(_mmlu(path.stem.removeprefix("mmlu_")) for path in _yamls("mmlu/default", "mmlu_*")), "items"
        ),
        "bbh": Suite("bbh", tuple(_bbh(path.stem) for path in _yamls("bbh/fewshot", "[a-z]*")), "items"),
        "world": Suite("world", tuple(Bench(f"world_{task}", f"world_{task}.yaml") for task in world.TASKS)),
    }


def _yamls(folder: str, pattern: str) -> list[Path]:
    return sorted((harness_tasks() / folder).glob(f"{pattern}.yaml"))


def _mmlu(subject: str) -> Bench:
    files = {"test": "mmlu_test.jsonl.gz", "dev": "mmlu_dev.jsonl.gz"}
    copy = Copy(
        files,
        ("question", "choices", "answer"),
        "whole splits; the shots are the rows of dev",
        where=("subject", subject),
    )
    return Bench(f"mmlu_{subject}", f"mmlu/default/mmlu_{subject}.yaml", shots=5, hub="cais/mmlu", copy=copy)


def _bbh(task: str) -> Bench:
    """Answers without reasoning after 3 shots that stand in the harness's YAML: `bbh_fewshot`, not `bbh`, which reasons
    first.

    The harness compares an answer with the space before it, so that no model whose tokenizer keeps it could be right;
    here it goes.
    """
    copy = Copy({"test": "bbh.jsonl.gz"}, ("input", "target"), "whole", where=("task", task))
    return Bench(
        f"bbh_{task}", f"bbh/fewshot/{task}.yaml", shots=3, hub="SaylorTwift/bbh", copy=copy, changes=_STRIPPED
    )
