"""Guides inside the pipelines of `diffusers`."""
