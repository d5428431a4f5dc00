"""Launch configurations that come with davae: accelerate's for one or several GPUs and machines, a Slurm script."""
