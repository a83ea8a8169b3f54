"""The device side: arenas, inputs, executors and the judgement of one case. Tensors live here and nowhere else."""
