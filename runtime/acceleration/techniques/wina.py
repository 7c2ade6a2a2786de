"""Weight-informed activation sparsity."""

from dataclasses import dataclass

from hasten.acceleration.techniques.input_sparsity import InputSparsity
from hasten.sparsity.wina import wina


@dataclass(frozen=True, slots=True)
class Wina(InputSparsity):
    """Weight-informed activation sparsity (Chen et al. 2025, arXiv 2505.19427): input j scores |x_j| * ||W[:, j]||_2,
    with the true column norms of every projection.

    Args:
        sparsity, allocation: as in `InputSparsity`.
    """

    factors = staticmethod(wina)
