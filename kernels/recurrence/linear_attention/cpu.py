"""The compiled recurrence without a correction."""

from ... import cpu
from .. import cpu as recurrence

_chunks = cpu.Function("linear_attention", recurrence.RecurrenceArguments)
_step = cpu.Function("linear_attention_step", recurrence.RecurrenceArguments)


def launch(q, k, v, beta, decay, scale, initial_state, normalize, skip, bounds, out_dtype):
    """Arguments and results as in `reference`."""
    settings = {"normalize": normalize, "skip": skip, "out_dtype": out_dtype}
    return recurrence.launch(_chunks, q, k, v, beta, decay, scale, initial_state, bounds, **settings)


def step(q, k, v, beta, state, decay, scale, normalize, skip):
    """The outputs; `state` is updated in place."""
    return recurrence.step(_step, q, k, v, beta, state, decay, scale, normalize=normalize, skip=skip)
