"""Adapters for the attention of RWKV-4."""

from collections.abc import Callable

from torch import nn

from hasten.acceleration.techniques.adapted_forwards import check_state, remade
from hasten.kernels.recurrence.wkv import wkv
from hasten.kernels.sequence import state_dtype


def attend_rwkv(time_decay, time_first, key, value, state=None, return_state=False):
    """For `rwkv_linear_attention`: the state is (numerator, denominator, maximum), each [B, D]."""
    if state is not None:
        for part in state:
            check_state("recurrent state", part, [key.shape[0], key.shape[2]])
        state = tuple(part.to(state_dtype(key)) for part in state)
    output, after = wkv(time_decay, time_first, key, value, state=state, return_state=True)
    return output, list(after) if return_state or state is not None else None


RWKV = {"rwkv_linear_attention": attend_rwkv}


def rwkv_forward(layer: nn.Module) -> Callable:
    """The forward of an `RwkvSelfAttention`. In a step of several rows transformers 5.23 adds the last tokens of all
    rows to each, here and in the feed-forward layers, and returns [B, B, D]: such a step is refused."""
    usual = remade(**RWKV)(layer)

    def forward(self, hidden, state=None, use_cache=False):
        if state is not None and hidden.shape[0] > 1 and hidden.shape[1] == 1:
            raise ValueError(
                f"state: transformers' RWKV mixes the rows of a batch when one token follows a state, got a batch of "
                f"{hidden.shape[0]}: generate row by row, or with use_cache=False"
            )
        return usual(self, hidden, state=state, use_cache=use_cache)

    return forward
