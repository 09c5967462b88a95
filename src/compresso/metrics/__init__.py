"""Measures of a model: perplexity, divergence, written text, multiple choice, decoding speed; each number with its
protocol.
"""
