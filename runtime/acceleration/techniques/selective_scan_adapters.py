"""Adapters for the layers of Mamba, whose recurrence is the selective scan.

transformers' own scan begins at zero, whatever the cache holds: a turn of several tokens after a cached prefix forgets
that prefix. The forward made here hands the cached state to the scan.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from hasten.acceleration.techniques.adapted_forwards import check_state, refuse_others, remade
from hasten.acceleration.techniques.convolution_adapters import CONVOLUTION
from hasten.kernels.recurrence.selective_scan import selective_scan, selective_scan_step
from hasten.kernels.sequence import state_dtype


def scan_mamba(
    hidden_states,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
    initial_states: Iterator[torch.Tensor] | None = None,
    **others,
):
    """For `mamba_selective_scan`: hidden_states, dt and z are [B, D, T] there, B and C [B, N, T]. It takes the next of
    `initial_states`, which transformers does not know."""
    refuse_others(others)
    x = hidden_states.transpose(1, 2)
    output, state = selective_scan(
        x,
        dt.transpose(1, 2),
        A,
        B.transpose(1, 2),
        C.transpose(1, 2),
        D=D,
        z=None if z is None else z.transpose(1, 2),
        dt_bias=delta_bias,
        dt_softplus=delta_softplus,
        initial_state=None if initial_states is None else next(initial_states).to(state_dtype(x)),
        return_state=True,
    )
    output = output.transpose(1, 2)
    return (output, state) if return_last_state else output


def step_mamba(
    state,
    hidden_states,
    dt,
    A,
    B,
    C,
    D=None,
    dt_bias=None,
    dt_softplus=False,
    z=None,
    **others,
):
    """For `mamba_selective_state_update`: one token [B, D], and the state is updated in place."""
    refuse_others(others)
    check_state("recurrent state", state, [*hidden_states.shape, A.shape[1]])
    kept = state.to(state_dtype(hidden_states))
    output = selective_scan_step(
        hidden_states[:, None],
        dt[:, None],
        A,
        B[:, None],
        C[:, None],
        kept,
        D=D,
        z=None if z is None else z[:, None],
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
    )[:, 0]
    if kept is not state:
        state.copy_(kept)
    return output


MAMBA = CONVOLUTION | {"mamba_selective_scan": scan_mamba, "mamba_selective_state_update": step_mamba}


def mamba_forward(layer: nn.Module) -> Callable:
    """The forward of a layer of Mamba, which also continues a cached prefix by several tokens."""
    from_zero = remade(**MAMBA)(layer)

    def forward(self, hidden_states, cache_params=None, *arguments, **keywords):
        state = None
        if cache_params is not None and hidden_states.shape[1] > 1:
            state = cache_params.get_recurrent_state(self.layer_idx, state_idx=0)
        if state is None:
            return from_zero(self, hidden_states, cache_params, *arguments, **keywords)
        check_state("recurrent state", state, [hidden_states.shape[0], *self.A_log.shape])
        heads = iter(state.unbind(1) if self.A_log.dim() == 3 else [state])  # Zamba scans its heads one by one

        def scan(*inputs, **settings):
            return scan_mamba(*inputs, initial_states=heads, **settings)

        return remade(**MAMBA | {"mamba_selective_scan": scan})(self)(
            self, hidden_states, cache_params, *arguments, **keywords
        )

    return forward
