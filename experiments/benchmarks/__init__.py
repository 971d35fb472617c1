"""What `python -m experiments.benchmark` times."""
