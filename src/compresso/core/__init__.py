"""Pure parts: tensors in, tensors out. Imports torch and nothing of ours outside this folder."""
