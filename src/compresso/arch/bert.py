"""BERT (arXiv 1810.04805): the bidirectional encoder, with any head or none; every linear has a bias.

Hidden dimensions leave with their part of every norm, which then takes mean and variance over the others. The config
has no width of heads and takes it from the hidden size: heads and hidden dimensions leave in one ratio where the result
is to be stored. No axis of layers: the norms lie behind the residual sums, so a layer whose sub-layers add nothing
still normalises; its attention and its FFN can leave, its two norms are kept whole.
"""

from compresso.arch.base import register
from compresso.arch.encoder_stream import EncoderStream
from compresso.arch.parts import Parts
from compresso.arch.stack import Stack

PARTS = Parts(
    attention="attention",
    core="attention.self",
    read=("attention.self.query", "attention.self.key", "attention.self.value"),
    write="attention.output.dense",
    ffn="",
    up=("intermediate.dense",),
    down="output.dense",
    head_dim="attention_head_size",
    heads=("num_attention_heads",),
    widths=("all_head_size",),
    sum_norms=("attention.output.LayerNorm", "output.LayerNorm"),
)
"""Of a layer of BERT, and of the families that have its names."""
BERT = register(
    Stack(
        name="bert",
        layers=("bert.encoder.layer", "encoder.layer"),
        parts=PARTS,
        generates=False,
        norm_first=lambda _: False,
        stream=EncoderStream(
            norms=("attention.output.LayerNorm", "output.LayerNorm"),
            tables=tuple(f"embeddings.{which}_embeddings" for which in ("word", "position", "token_type")),
            outer_norms=("embeddings.LayerNorm", "cls.predictions.transform.LayerNorm"),
            read=(
                "pooler.dense",
                "cls.predictions.transform.dense",
                "cls.predictions.decoder",
                "cls.seq_relationship",
                "classifier",
                "qa_outputs",
            ),
            copied=("pooler.dense", "cls.predictions.transform.dense"),
            gated=("pooler.dense",),
        ),
    )
)
