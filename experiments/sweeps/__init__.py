"""Sweeps: runs, where each stands, and how they are launched."""
