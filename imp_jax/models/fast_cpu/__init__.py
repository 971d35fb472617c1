"""Kernels that make convolutional networks fast on a CPU."""
