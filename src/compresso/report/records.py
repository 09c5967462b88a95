"""records.json: what a run did, from what, and what it found; one versioned schema for writing and for reading.

An unknown field, a missing one or another version is an error, so that a damaged file is found before anything is
drawn. Only what a stage notes of itself is open, since each method has facts of its own; those that reports show are
typed.
"""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, FiniteFloat, ValidationError, model_validator

from compresso.core.faults import said
from compresso.errors import CheckpointError
from compresso.metrics.guard import Guard
from compresso.metrics.record import Report, Strict, upgraded
from compresso.report.stage_facts import StageFacts, filled, full_again, ranks_of

FORMAT = 3


class Named(Strict):
    """A model: its name without a path, and the fingerprint of its config and weights."""

    name: str
    fingerprint: str


class RecipeRun(Strict):
    """A recipe with every knob spelled out, as it can be run again."""

    name: str
    title: str = ""
    paper: str = ""
    description: str = ""
    task: str = "causal-lm"
    data: dict[str, Any] = Field(default_factory=dict[str, Any])
    cost: dict[str, Any] = Field(default_factory=dict[str, Any])
    stages: list[dict[str, dict[str, Any]]]

    def knobs(self) -> dict[str, dict[str, Any]]:
        """Stage name -> knobs, in order."""
        return {name: knobs for stage in self.stages for name, knobs in stage.items()}


class DataUsed(Strict):
    """The training data: what was named, its hash, the lines that were omitted, what became of the others (`Stats` in
    `compresso.data.survival`), the columns that were read and that were not, with their rows, and what was said of it.
    """

    source: str
    kind: str
    sha256: str
    skipped_lines: int
    skipped: list[Any]
    examples: dict[str, int]
    columns: dict[str, int] = Field(default_factory=dict[str, int])
    passed_over: dict[str, int] = Field(default_factory=dict[str, int])
    notes: list[str] = Field(default_factory=list[str])


class Counted(Strict):
    """What was counted of a model, and its mean loss on held-out examples in nats a labelled token; of a mixture of
    experts the parameters that a token meets, too. Multiply-accumulates are those of a token, of a picture,
    or of a patch of one.
    """

    parameters: dict[str, int]
    macs_per_token: int
    kv_bytes_per_token: int
    held_loss: FiniteFloat | None
    active_parameters_per_token: int | None = None
    macs_of: Literal["token", "picture", "patch"] = "token"


class Engine(Strict):
    """What one engine made of the files: yes only if it opened them and computed the same; see
    `compresso.engines.parity.Parity`.
    """

    engine: str
    opens: Literal["yes", "no", "not installed", "not checked"]
    reason: str = ""
    difference: FiniteFloat | None = None
    same_tokens: int | None = None


class PatchRecord(Strict):
    """A forward patch that one line does not say; its tensors lie in the folder."""

    name: str
    params: dict[str, Any]
    tensors: tuple[str, ...] = ()


class RunRecords(Strict):
    """A run's records.

    Args:
        format: version of this schema.
        recipe, model, data, prompt, seed, versions, machine: what decided the result; `data` and `prompt` are None
            where there are none.
        dense: what a stage made of `model` before anything was removed, as a baseline; None where that is `model`.
        before, after: the dense model and the result.
        stages: what each stage noted, by its name.
        patches: forward patches, which `compresso.load` applies to what the files hold.
        seconds: of the whole run, over all of its pieces.
        since_resume: whether those before a resume are missing, since the version that ran them did not save them.
        layout, dtype, bytes: what was written, and the size of its weight files.
        modeling: the file with the model's class, which lies beside the weights where transformers has none; "" for a
            stock class, and for the classes of dense models per layer, which the layout says.
        reopened_max_abs_difference: of logits, between the live model and the files opened in a fresh process.
        engines: what each engine made of the files; none if the run did not ask.
        guard: whether quality collapsed.
        report: the original and the result, measured.
    """

    format: Literal[3] = FORMAT
    recipe: RecipeRun
    model: Named
    data: DataUsed | None
    prompt: dict[str, str] | None
    dense: Named | None = None
    seed: int
    versions: dict[str, str]
    machine: dict[str, str | int | None]
    before: Counted
    after: Counted
    stages: dict[str, StageFacts]
    patches: tuple[str | PatchRecord, ...] = ()
    seconds: FiniteFloat
    since_resume: bool = False
    layout: Literal["uniform", "padded", "native"]
    modeling: str = ""
    dtype: str
    bytes: int
    reopened_max_abs_difference: FiniteFloat
    engines: tuple[Engine, ...] = ()
    guard: Guard
    report: Report

    @model_validator(mode="before")
    @classmethod
    def _read_format_2(cls, data: object) -> object:
        """Release 0.1 called the report "account"."""
        return upgraded(data, from_format=2, key="account", new_key="report")

    def baseline(self) -> Named:
        """The model that the result is compared with."""
        return self.dense or self.model

    def class_file(self) -> str:
        """The file beside the weights that holds the model's class; "" where transformers has it."""
        return self.modeling or ("modeling_compresso.py" if self.layout == "native" else "")

    def stored_dense(self) -> str:
        """A sentence on weights that were zeroed, rounded or given a low rank in place, so that nothing became smaller;
        "" if there are none.
        """
        stages = self.stages
        there = [name for name in stages if stages[name].zeroed and not filled(stages, name)]
        zeros = [f"{stages[name].zeroed:.1%} zeros by {name}" for name in there]
        rounded = [f"{facts.bits:g} bits a weight by {name}" for name, facts in stages.items() if facts.bits]
        ranks = [f"low rank by {name}" for name in stages if ranks_of(stages[name]) and not full_again(stages, name)]
        if not zeros and not rounded and not ranks:
            return ""
        done = ", ".join(zeros + rounded + ranks)
        said = f"{done}, of the weights it worked on, stored dense: no smaller and no faster for it."
        return (said[0].upper() + said[1:]).replace("%", " %")

    @classmethod
    def checked(cls, records: Mapping[str, Any], where: str) -> Self:
        """The records in a mapping.

        Raises:
            CheckpointError: naming `where` and the first field that is not as it should be.
        """
        try:
            return cls.model_validate(records)
        except ValidationError as error:
            raise CheckpointError(
                f"{where}: {first_fault(error)}; it was changed, or written by another version of compresso"
            ) from error


def first_fault(error: ValidationError) -> str:
    """The first thing pydantic found wrong, in one line: "versions.torch: is missing"."""
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(str(part) for part in first['loc']) or 'the whole'}: {said([first])}"
