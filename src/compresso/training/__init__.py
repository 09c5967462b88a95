"""The training loop: order of data, noise, processes, progress, checkpoints and crashes are handled here and nowhere
else.
"""
