"""Which units are kept: every way to turn scores and a budget into a plan, under one name; the exact one needs scipy's
solver.
"""
