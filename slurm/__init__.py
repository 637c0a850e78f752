"""Submits dinokit commands as jobs to a SLURM cluster; installed as dinokit.slurm."""
