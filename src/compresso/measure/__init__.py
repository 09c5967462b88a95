"""Measures of a model: perplexity, multiple choice and decoding speed, each with the protocol that made the number."""
