"""A product of bfloat16 matrices as the kernels make theirs: what the instruction set of this machine is chosen by, and
what tests hold the shared tiles to. Models multiply by torch."""
