"""Scores of tokens by the attention that few queries pay to them, and rows of several tensors gathered at once."""

from .op import gather_tokens, token_scores

__all__ = ["gather_tokens", "token_scores"]
