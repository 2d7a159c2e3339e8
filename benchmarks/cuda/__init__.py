"""What can be said of the CUDA backend without a GPU: who holds what, the bytes it moves, its machine code."""
