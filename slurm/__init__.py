"""Jobs on a SLURM cluster, installed as dinokit.slurm: from a profile and a command to a job."""
