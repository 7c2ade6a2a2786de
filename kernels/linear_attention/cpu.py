"""How the compiled CPU kernels are called."""

from .. import cpu, recurrence


def launch(q, k, v, decay, scale, initial_state, bounds):
    """Arguments and results as in `reference`, without a normaliser."""
    return recurrence.launch(cpu.kernels().linear_attention, q, k, v, None, decay, initial_state, bounds, scale)


def step(q, k, v, state, decay, scale):
    """The outputs; `state` is updated in place."""
    return recurrence.step(cpu.kernels().linear_attention_step, q, k, v, None, state, decay, scale)
