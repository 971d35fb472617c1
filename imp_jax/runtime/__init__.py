"""Devices, processes, compilation and signals: what depends on the machine rather than on the method."""
