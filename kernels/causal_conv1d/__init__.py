"""Short depthwise causal convolution, over a sequence and as a step."""

from .op import causal_conv1d, causal_conv1d_update

__all__ = ["causal_conv1d", "causal_conv1d_update"]
