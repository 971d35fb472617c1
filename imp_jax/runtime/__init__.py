"""What the machine has to do with a run: devices, processes, compilation and signals."""
