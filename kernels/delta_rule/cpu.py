"""How the compiled CPU kernels are called."""

from .. import cpu, recurrence


def launch(q, k, v, beta, decay, scale, initial_state, l2_norm, bounds):
    """Arguments and results as in `reference`."""
    return recurrence.launch(cpu.kernels().delta_rule, q, k, v, beta, decay, initial_state, bounds, scale, l2_norm)


def step(q, k, v, beta, state, decay, scale, l2_norm):
    """The outputs; `state` is updated in place."""
    return recurrence.step(cpu.kernels().delta_rule_step, q, k, v, beta, state, decay, scale, l2_norm)
