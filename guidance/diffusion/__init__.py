"""Guides: how the predictions of one diffusion step are combined, and what samples with them."""
