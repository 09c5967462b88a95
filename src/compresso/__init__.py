"""compresso: smaller, faster Hugging Face checkpoints, with an account of what they cost."""
