"""compresso: smaller, faster Hugging Face checkpoints, with an account of what they cost.

Importing it registers our per-layer model classes with transformers, so that `AutoModelForCausalLM.from_pretrained` opens our checkpoints.
"""

from compresso.export.native import register

register()
