"""DeiT (arXiv 2012.12877): a ViT with a second token that distillation was trained on; its layers are ViT's.

`DeiTForImageClassification` reads the class token alone. No hidden axis: LayerNorm subtracts the mean of the residual
stream.
"""

from dataclasses import replace

from compresso.arch.base import register
from compresso.arch.vit import VIT

DEIT = replace(VIT, name="deit", layers=("deit.layers", "layers"))
register(DEIT)
