"""The subjects of `python -m experiments.benchmark`, one module each, and what they share."""
