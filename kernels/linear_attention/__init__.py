"""Causal linear attention with decay, in chunks and in steps."""

from .op import linear_attention, linear_attention_step

__all__ = ["linear_attention", "linear_attention_step"]
