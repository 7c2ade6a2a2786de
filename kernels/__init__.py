"""Tensors in, tensors out: one folder per operator, with its definition in torch,
its C++ for CPUs and Triton for GPUs."""
