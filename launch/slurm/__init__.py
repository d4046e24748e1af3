"""Runs jobs under SLURM: the script that is submitted, and the supervisor inside of the job."""
