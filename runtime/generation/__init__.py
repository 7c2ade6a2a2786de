"""Constrained generation with the language models of `transformers`."""
