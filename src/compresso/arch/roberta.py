"""RoBERTa (arXiv 1907.11692): BERT's layers under the same names; positions are counted from behind the padding token's
id, and its head for masked tokens is its own.
"""

from compresso.arch.base import register
from compresso.arch.bert import PARTS
from compresso.arch.stack import Stack

ROBERTA = register(
    Stack(
        name="roberta",
        layers=("roberta.encoder.layer", "encoder.layer"),
        parts=PARTS,
        generates=False,
        norm_first=lambda _: False,
    )
)
