"""One module an engine: what is written opened there, and compared with the live model."""
