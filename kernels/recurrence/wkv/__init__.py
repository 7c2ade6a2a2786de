"""The recurrence of RWKV-4."""

from .op import wkv

__all__ = ["wkv"]
