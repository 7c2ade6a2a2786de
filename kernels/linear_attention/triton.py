"""How the Triton kernels are called."""

from .. import triton_recurrence


def launch(q, k, v, decay, scale, initial_state, bounds):
    """Arguments and results as in `reference`, without a normaliser."""
    return triton_recurrence.launch(q, k, v, None, decay, scale, initial_state, False, bounds)


def step(q, k, v, state, decay, scale):
    """The outputs; `state` is updated in place."""
    return triton_recurrence.step(q, k, v, None, state, decay, scale, False)
