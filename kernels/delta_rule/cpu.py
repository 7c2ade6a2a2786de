"""How the compiled CPU kernel is called."""

from functools import partial

from .. import sequence
from . import chunked


def launch(q, k, v, beta, decay, scale, initial_state, l2_norm, bounds):
    alone = partial(chunked.delta_rule, scale=scale, l2_norm=l2_norm)
    return sequence.per_sequence(alone, (q, k, v, beta), decay, initial_state, bounds)


def step(q, k, v, beta, state, decay, scale, l2_norm):
    o, new = chunked.delta_rule(q, k, v, beta, decay, scale, state, l2_norm)
    state.copy_(new)
    return o
