"""What a report reads of a run's records.json: a checked view, so that a damaged file is found before anything is drawn.

Fields that a report does not show are ignored. Format 1 has no account and no guard; what it counted and nothing else can be shown.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from compresso.errors import CheckpointError
from compresso.measure.record import Account

Fraction = Annotated[str, Field(pattern=r"^\d+/\d+$")]
"""Units kept of those that were there, "3/4"."""


class Seen(BaseModel):
    """Base of the views: frozen, unknown fields ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Named(Seen):
    """A model: its name without a path, and the fingerprint of its config and weights."""

    name: str
    fingerprint: str


class RecipeSeen(Seen):
    """A recipe with every knob spelled out, as it can be run again."""

    name: str
    title: str = ""
    paper: str = ""
    description: str = ""
    data: dict[str, Any] = {}
    stages: list[dict[str, dict[str, Any]]]

    def knobs(self) -> dict[str, dict[str, Any]]:
        """Stage name -> knobs, in order."""
        return {name: knobs for stage in self.stages for name, knobs in stage.items()}


class DataSeen(Seen):
    """The training data: what was named, its hash, and how many examples it gave."""

    source: str
    kind: str
    sha256: str
    examples: dict[str, int]


class Counted(Seen):
    """What was counted of a model, and its mean loss on held-out examples in nats a labelled token."""

    parameters: dict[str, int]
    macs_per_token: int
    kv_bytes_per_token: int
    held_loss: FiniteFloat | None = None


class StageSeen(Seen):
    """What a stage noted; `curve` has columns of equal length, "update" the horizontal one."""

    units_kept: dict[str, Fraction] = {}
    kept_share_of_blocks: FiniteFloat | None = None
    curve: dict[str, list[FiniteFloat | None]] = {}
    seconds: FiniteFloat | None = None


Verdict = Literal["ok", "warn", "refuse", "unchecked"]


class CheckSeen(Seen):
    """One check of the collapse guard: its verdict, and a sentence with the number and the thresholds."""

    verdict: Verdict
    words: str


class GuardSeen(Seen):
    """The collapse guard's decision and the checks behind it."""

    verdict: Verdict
    message: str = ""
    checks: tuple[CheckSeen, ...] = ()


class RunRecords(Seen):
    """A run's records."""

    format: Literal[1, 2]
    recipe: RecipeSeen
    model: Named
    data: DataSeen | None = None
    prompt: dict[str, str] | None = None
    seed: int
    versions: dict[str, str]
    machine: dict[str, str | int | None]
    before: Counted
    after: Counted
    stages: dict[str, StageSeen]
    seconds: FiniteFloat | None = None
    layout: Literal["uniform", "padded", "native"]
    dtype: str | None = None
    bytes: int | None = None
    account: Account | None = None
    guard: GuardSeen | None = None

    @classmethod
    def checked(cls, records: Mapping[str, Any], where: str) -> Self:
        """The view of raw records. Raises CheckpointError naming `where` and the first field that is not as it should be."""
        try:
            return cls.model_validate(records)
        except ValidationError as error:
            raise CheckpointError(f"{where}: {first_fault(error)}; it was changed, or written by another version of compresso") from error


def first_fault(error: ValidationError) -> str:
    """The first thing pydantic found wrong, in one line: "versions.torch: Field required"."""
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(str(part) for part in first['loc']) or 'the whole'}: {first['msg']}"
