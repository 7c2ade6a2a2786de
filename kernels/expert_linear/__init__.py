"""Linear layers of a mixture of experts, of which every row picks its own."""

from .op import expert_linear

__all__ = ["expert_linear"]
