"""Hydra launcher `submitit_slurm`: a sweep is a Slurm job array. The class is in slurm_launcher.py."""
