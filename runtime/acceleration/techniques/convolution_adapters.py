"""Adapters for the short convolutions of linear-attention layers."""

from hasten.acceleration.techniques.adapted_forwards import refuse_others
from hasten.kernels.causal_conv1d import causal_conv1d, causal_conv1d_update


def conv1d(hidden_states, weight, bias=None, activation=None, **others):
    """For `causal_conv1d_fn`."""
    refuse_others(others)
    return causal_conv1d(hidden_states, weight, bias, activation=activation)


def conv1d_update(hidden_states, conv_state, weight, bias=None, activation=None):
    """For `causal_conv1d_update`: the state is shifted in place."""
    return causal_conv1d_update(hidden_states, conv_state, weight, bias, activation=activation)


CONVOLUTION = {"causal_conv1d_fn": conv1d, "causal_conv1d_update": conv1d_update}
