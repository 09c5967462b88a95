"""The loops that run a model: devices, processes, order of data, progress, checkpoints and crashes are handled here and nowhere else."""
