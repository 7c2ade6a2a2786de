"""Activation sparsity by magnitude."""

from dataclasses import dataclass

from hasten.acceleration.techniques.input_sparsity import InputSparsity
from hasten.sparsity.teal import teal


@dataclass(frozen=True, slots=True)
class Teal(InputSparsity):
    """Activation sparsity by magnitude (Liu et al. 2024, arXiv 2408.14690): input j scores |x_j|.

    Args:
        sparsity, allocation: as in `InputSparsity`.
    """

    factors = staticmethod(teal)
