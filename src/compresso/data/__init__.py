"""Data: the embedded world and its nano model, readers of instruction and text data, batches."""
