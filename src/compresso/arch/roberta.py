"""RoBERTa (arXiv 1907.11692): BERT's layers under the same names; positions are counted from behind the padding token's
id, and its head for masked tokens is its own.
"""

from compresso.arch.base import register
from compresso.arch.bert import PARTS
from compresso.arch.encoder_stream import EncoderStream
from compresso.arch.stack import Stack

ROBERTA = register(
    Stack(
        name="roberta",
        layers=("roberta.encoder.layer", "encoder.layer"),
        parts=PARTS,
        generates=False,
        norm_first=lambda _: False,
        stream=EncoderStream(
            norms=PARTS.sum_norms,
            tables=tuple(f"embeddings.{which}_embeddings" for which in ("word", "position", "token_type")),
            outer_norms=("embeddings.LayerNorm", "lm_head.layer_norm"),
            read=(
                *("pooler.dense", "lm_head.dense", "lm_head.decoder"),
                *("classifier.dense", "classifier.out_proj", "qa_outputs"),
            ),
            copied=("pooler.dense", "lm_head.dense", "classifier.dense"),
            gated=("pooler.dense", "classifier.dense"),
        ),
    )
)
