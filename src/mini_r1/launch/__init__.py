"""Recipe + machine -> who runs where: plan, memory, the vLLM server, doctor, SLURM."""
