"""Recurrences over a matrix of state: linear attention and the delta rule, and the kernels that they share."""
