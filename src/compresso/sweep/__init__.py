"""The loop that edits a model block after block, and what it edits with."""
