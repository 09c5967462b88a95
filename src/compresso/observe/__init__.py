"""Passes over a model that change nothing: statistics folded over hooked sites, scores of units, losses."""
