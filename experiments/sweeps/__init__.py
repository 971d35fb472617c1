"""Sweeps: runs, their states and costs, and how they are launched."""
