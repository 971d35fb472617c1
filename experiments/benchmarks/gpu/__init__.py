"""What the GPU program of each network is and costs, from XLA's compiler, on a machine without a GPU."""
