"""Runs that are broken on purpose, for `python -m experiments.faults`."""
