"""Tensors in, tensors out: one folder per operator, with its plain torch definition, its C++ for CPUs and its Triton for GPUs."""
