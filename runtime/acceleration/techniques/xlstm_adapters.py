"""The cell of xLSTM (Beck et al. 2024, arXiv 2405.04517, mLSTM) as linear attention.

C_t = f_t C_{t-1} + i_t k_t v_t^T and n_t = f_t n_{t-1} + i_t k_t, with f = sigmoid and i = exp of their preactivations,
are kept divided by exp(m_t), m_t = max(log f_t + m_{t-1}, i_t). With F the cumulative sum of log f and
M_t = max(m_0, max over s <= t of i_s - F_s), m_t = F_t + M_t: the decay is M_{t-1} - M_t <= 0, and what a token writes
is weighted by exp(i_t - F_t - M_t) <= 1.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from hasten.acceleration.techniques.adapted_forwards import check_state
from hasten.kernels.recurrence.linear_attention import linear_attention, linear_attention_step
from hasten.kernels.sequence import state_dtype


def mlstm_forward(layer: nn.Module) -> Callable:
    """The forward of an `xLSTMBackend`. States are transformers' own: C [B, H, K, V], n [B, H, K] and m [B, H, 1]."""
    kept = getattr(torch, layer.config.inference_state_dtype)

    def forward(
        self,
        query,
        key,
        value,
        igate,
        fgate,
        c_initial=None,
        n_initial=None,
        m_initial=None,
        return_last_states=None,
        mode=None,
    ):
        mode = mode or self.config.mode
        if mode != "inference":
            raise ValueError(f"mode: hasten's kernels know xLSTM's 'inference' alone, got {mode!r}: revert the model")
        if return_last_states is False:
            raise ValueError("return_last_states: in inference xLSTM always returns them, got False")
        B, H, T, K = query.shape
        V = value.shape[3]
        dtype = state_dtype(query)
        given = {"C": (c_initial, [B, H, K, V]), "n": (n_initial, [B, H, K]), "m": (m_initial, [B, H, 1])}
        for name, (state, shape) in given.items():
            if state is not None:
                check_state(f"state {name}", state, shape)
        C, n, m = (
            torch.zeros(shape, dtype=dtype, device=query.device) if state is None else state.to(dtype)
            for state, shape in given.values()
        )
        decay, gate, stabilizer = _gates(igate, fgate, m)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        settings = {"beta": gate, "decay": decay, "scale": K**-0.5}
        if T == 1:
            q, k, v = (x.to(dtype) for x in (q, k, v))
            C = C.clone()
            numerator = linear_attention_step(q, k, v, C, **settings)
            n = n * decay[:, 0, :, None].exp().to(dtype) + gate[:, 0, :, None].to(dtype) * k[:, 0]
            normalizer = K**-0.5 * (q[:, 0] * n).sum(-1)[:, None]
        else:
            v, both = torch.cat([v, v.new_ones(B, T, H, 1)], -1), torch.cat([C, n[..., None]], -1)
            settings |= {"initial_state": both, "return_state": True, "out_dtype": dtype}
            output, both = linear_attention(q, k, v, **settings)
            numerator, normalizer = output[..., :V], output[..., V]
            C, n = both[..., :V], both[..., V]
        denominator = torch.maximum(normalizer.abs(), (-stabilizer).exp().to(dtype)) + self.config.eps
        h = (numerator / denominator[..., None]).to(query.dtype).transpose(1, 2)
        return h, (C.to(kept), n.to(kept), stabilizer[:, -1, :, None].to(kept))

    return forward


def _gates(igate, fgate, m) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The decay, the weight of what is written and m_t, each [B, T, H] in float64, for preactivations [B, H, T]."""
    forgotten = F.logsigmoid(fgate.double()).cumsum(-1)
    gain = igate.double() - forgotten
    largest = torch.maximum(gain.cummax(-1).values, m.double())
    decay = -torch.diff(largest, prepend=m.double())
    return tuple(x.transpose(1, 2) for x in (decay, (gain - largest).exp(), forgotten + largest))
