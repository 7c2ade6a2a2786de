"""The compiled recurrence with the delta rule's correction."""

from ... import cpu
from .. import cpu as recurrence

_chunks = cpu.Function("delta_rule", recurrence.RecurrenceArguments)
_step = cpu.Function("delta_rule_step", recurrence.RecurrenceArguments)


def launch(q, k, v, beta, decay, scale, initial_state, l2_norm, bounds):
    """Arguments and results as in `reference`."""
    return recurrence.launch(_chunks, q, k, v, beta, decay, scale, initial_state, bounds, l2_norm=l2_norm)


def step(q, k, v, beta, state, decay, scale, l2_norm):
    """The outputs; `state` is updated in place."""
    return recurrence.step(_step, q, k, v, beta, state, decay, scale, l2_norm=l2_norm)
