"""The suffixes of a text in order."""

from .op import suffix_array

__all__ = ["suffix_array"]
