"""DistilBERT (arXiv 1910.01108): BERT's layers under other names, without token types and pooler.

Hidden dimensions leave as BERT's do; no axis of layers, for its reasons.
"""

from compresso.arch.base import register
from compresso.arch.encoder_stream import EncoderStream
from compresso.arch.parts import Parts
from compresso.arch.stack import Stack

DISTILBERT = register(
    Stack(
        name="distilbert",
        layers=("distilbert.transformer.layer", "transformer.layer"),
        parts=Parts(
            attention="attention",
            core="attention",
            read=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
            write="attention.out_lin",
            ffn="ffn",
            up=("ffn.lin1",),
            down="ffn.lin2",
            head_dim="attention_head_size",
            heads=("n_heads",),
            channels="hidden_dim",
            sum_norms=("sa_layer_norm", "output_layer_norm"),
        ),
        generates=False,
        norm_first=lambda _: False,
        stream=EncoderStream(
            norms=("sa_layer_norm", "output_layer_norm"),
            tables=("embeddings.word_embeddings", "embeddings.position_embeddings"),
            outer_norms=("embeddings.LayerNorm", "vocab_layer_norm"),
            read=("vocab_transform", "vocab_projector", "pre_classifier", "classifier", "qa_outputs"),
            copied=("vocab_transform", "pre_classifier"),
            gated=("pre_classifier",),
        ),
    )
)
