"""An example as a model reads it."""

from typing import NotRequired, TypedDict

from compresso.core.answer_window import AnswerWindow
from compresso.core.masking import Masking
from compresso.core.picture import Picture


class Row(TypedDict):
    """One example: its ids, and for each the label, which is the id itself or `data.batches.IGNORED`; of a classified
    text one label in all; of a question, where its answer begins and ends. Where it is known, the source it came from;
    of a pair of texts, which id belongs to which; of a masked text, how it was masked; of a question, what answers are
    read from; of a picture, its pixels, and no ids.
    """

    input_ids: list[int]
    labels: list[int]
    source: NotRequired[str]
    token_type_ids: NotRequired[list[int]]
    masking: NotRequired[Masking]
    window: NotRequired[AnswerWindow]
    picture: NotRequired[Picture]
