"""Causal linear attention with decay, in chunks and in steps, and its bidirectional form."""

from .bidirectional import bidirectional_linear_attention
from .op import linear_attention, linear_attention_step

__all__ = ["bidirectional_linear_attention", "linear_attention", "linear_attention_step"]
