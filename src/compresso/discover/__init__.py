"""Axes of a model nobody described, found from one traced forward of its operations."""
