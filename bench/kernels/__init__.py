"""The cases of the kernels, one module per operator."""
