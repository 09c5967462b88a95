"""What all dimensions of trust ask: every file is read and checked, and the questions chosen, before a model is opened.

A file of another form then costs a second, and not a run that fails at its end. What was read is what is asked, even
where the file has changed since.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from compresso.metrics.record import Setting
from compresso.metrics.trust.asking import Request
from compresso.metrics.trust.data import Missing, TrustData
from compresso.metrics.trust.dimension import Dimension, Question, Scoring
from compresso.metrics.trust.dimensions import DIMENSIONS
from compresso.metrics.trust.dimensions.toxicity import toxic_requests
from compresso.metrics.trust.strata import Limit, stratified

QUICK, QUICK_WRITTEN = 40, 8
"""Questions of a dimension, and those of them that are also answered in words, for a first look."""
WRITTEN = 64


@dataclass(frozen=True)
class Extent:
    """How much is asked.

    Args:
        scoring: how answers are read.
        limit: most questions of a dimension; None for all.
        written: of the weighed ones, those that are also answered in words.
        draws: texts for a request that is published as sampled.
        seed: of the choice of questions.
    """

    scoring: Scoring = "likelihood"
    limit: Limit | None = None
    written: int = WRITTEN
    draws: int = 25
    seed: int = 0

    def settings(self) -> dict[str, Setting]:
        """For a protocol."""
        limit = f"{100 * self.limit:g} % of a dimension" if isinstance(self.limit, float) else self.limit
        return {
            "scoring": self.scoring,
            "limit": limit,
            "draws": None if self.scoring == "likelihood" else self.draws,
            "subset_seed": self.seed,
        }


@dataclass(frozen=True)
class Asked:
    """One dimension.

    Args:
        dimension: that is asked about.
        questions: that are asked, chosen.
        parts: of all questions there are.
        missing: why none is; "" if some are.
        remark: what of the published dimension is ours, or not here.
    """

    dimension: Dimension
    questions: tuple[Question, ...] = ()
    parts: tuple[str, ...] = ()
    missing: str = ""
    remark: str = ""


@dataclass(frozen=True)
class TrustQuestions:
    """All that is asked.

    Args:
        extent: how much.
        asked: the dimensions whose questions have choices, in the published order.
        toxic: of each part of toxicity the texts to go on with.
        not_toxic: why toxicity is not measured; "" if it is.
        toxic_parts: of toxicity, those whose texts were not chosen, too.
    """

    extent: Extent
    asked: tuple[Asked, ...]
    toxic: dict[str, list[Request]] = field(default_factory=dict[str, list[Request]])
    not_toxic: str = ""
    toxic_parts: tuple[str, ...] = ()

    def requests(self) -> list[tuple[Request, tuple[str, ...]]]:
        """Everything that is asked, with the choices."""
        asked = [(one.request, one.choices) for dimension in self.asked for one in dimension.questions]
        return [*asked, *((one, ()) for mine in self.toxic.values() for one in mine)]


def questions_of(
    data: TrustData, extent: Extent, scored: bool = False, dimensions: Sequence[Dimension] = DIMENSIONS
) -> TrustQuestions:
    """The questions of all dimensions.

    Args:
        data: the files.
        extent: how much is asked.
        scored: whether a scorer of toxicity is at hand; without one its texts are not read.
        dimensions: that are asked about, beside toxicity.

    Raises:
        DataError: a file of another form, with its row and field.
    """
    toxic, not_toxic = dict[str, list[Request]](), ""
    try:
        toxic = _toxic(data, extent, scored)
    except Missing as missing:
        not_toxic = str(missing)
    asked = tuple(_asked(one, data, extent) for one in dimensions)
    return TrustQuestions(extent, asked, {part: mine for part, mine in toxic.items() if mine}, not_toxic, tuple(toxic))


def _toxic(data: TrustData, extent: Extent, scored: bool) -> dict[str, list[Request]]:
    """Of each part the chosen texts, perhaps none."""
    if not scored:
        raise Missing("no scorer was given, and none is shipped")
    if extent.scoring == "likelihood":
        raise Missing("a scorer reads texts, and likelihood writes none; give --scoring sampled")
    requests = toxic_requests(data, extent.draws)
    names = [(part, one.id.partition("#")[0]) for part, mine in requests.items() for one in mine]
    keys = list(dict.fromkeys(names))
    parts = [part for part, _ in keys]
    kept = {keys[i] for i in stratified(parts, extent.limit, extent.seed, parts)}
    return {part: [one for one in mine if (part, one.id.partition("#")[0]) in kept] for part, mine in requests.items()}


def _asked(dimension: Dimension, data: TrustData, extent: Extent) -> Asked:
    try:
        every = dimension.questions(data, extent.scoring, extent.draws)
    except Missing as missing:
        return Asked(dimension, missing=str(missing))
    if isinstance(extent.limit, int):
        extent = replace(extent, limit=max(extent.limit, dimension.least))
    parts = tuple(dict.fromkeys(one.part for one in every))
    return Asked(dimension, tuple(_chosen(every, extent)), parts, remark=dimension.remark(data))


def _chosen(questions: Sequence[Question], extent: Extent) -> list[Question]:
    """As many as are asked, with their share of every part and group, and one of each part where there is room; all
    draws of what is chosen.
    """
    first = [one for one in questions if one.request.id.partition("#")[2] in ("", "0")]
    strata, parts = [(one.part, one.group, one.right) for one in first], [one.part for one in first]
    kept = stratified(strata, extent.limit, extent.seed, parts)
    ids = {first[i].request.id.partition("#")[0] for i in kept}
    return [one for one in questions if one.request.id.partition("#")[0] in ids]
