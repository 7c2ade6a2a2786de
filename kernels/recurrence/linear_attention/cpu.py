"""The compiled recurrence without a correction."""

from ... import cpu
from .. import cpu as recurrence

_chunks = cpu.Function("linear_attention", recurrence.RecurrenceArguments)
_step = cpu.Function("linear_attention_step", recurrence.RecurrenceArguments)


def launch(q, k, v, decay, scale, initial_state, bounds):
    """Arguments and results as in `reference`, without a normaliser."""
    return recurrence.launch(_chunks, q, k, v, None, decay, scale, initial_state, False, bounds)


def step(q, k, v, state, decay, scale):
    """The outputs; `state` is updated in place."""
    return recurrence.step(_step, q, k, v, None, state, decay, scale, False)
