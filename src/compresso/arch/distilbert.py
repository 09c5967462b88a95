"""DistilBERT (arXiv 1910.01108): BERT's layers under other names, without token types and pooler.

No hidden axis and no axis of layers, for BERT's reasons.
"""

from compresso.arch.base import register
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
    )
)
