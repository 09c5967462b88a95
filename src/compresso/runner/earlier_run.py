"""What an earlier run of compresso did to a model's weights, and a later one would lose."""

from compresso.checkpoint.folder import read_json
from compresso.checkpoint.source import Source
from compresso.errors import CheckpointError
from compresso.formats.hf import RECORDS


def rounded_by(source: Source) -> str:
    """The stage that rounded a model's weights last, by the records beside them; "" where none did, or none are there
    that can be read.
    """
    path = None if source.folder is None else source.folder / RECORDS
    if path is None or not path.is_file():
        return ""
    try:
        stages = read_json(path).get("stages")
    except CheckpointError:  # of whoever wrote them: they decide nothing
        return ""
    noted = stages.items() if isinstance(stages, dict) else ()
    names = [name for name, facts in noted if isinstance(facts, dict) and facts.get("bits")]
    return names[-1] if names else ""


def lost(source: Source, changing: str, rounded: str) -> str:
    """What to say of a stage that changes weights which an earlier run had rounded.

    Args:
        source: the model.
        changing: the stage.
        rounded: the earlier run's, from `rounded_by`.
    """
    return (
        f"{changing} changes weights that {rounded} rounded when {source.name} was made, and what is left lies on no"
        f" grid: give the model from before {rounded}, and round last"
    )
