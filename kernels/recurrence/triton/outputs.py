"""The outputs of linear attention and of the delta rule, of all chunks in parallel."""

import triton
import triton.language as tl

from .arithmetic import VECTOR, locate, lower_product, product, sane, spans


@triton.jit(do_not_specialize=["T", "N"])
def outputs_kernel(
    p_o,  # [tokens, Hv, V]
    p_q,  # [tokens, H, K]; where components decay by themselves [tokens, Hv, K], decayed since its chunk began
    p_k,  # [tokens, H, K]
    p_u,  # [tokens, Hv, V]
    p_states,  # [slots, Hv, K, V]
    p_pairs,  # [slots, Hv, C, C]: weights of u, where components decay by themselves; else the four are not None:
    p_decay,  # [tokens or 1, Hv]
    p_weight,  # [tokens, Hv] or None: of keys
    p_bounds,  # [N + 1] or None
    scale,
    T,
    N,
    H,
    Hv,
    K,
    V,
    q_stride,
    k_stride,
    u_stride,
    decay_stride,
    weight_stride,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PACKED: tl.constexpr,
):
    """o = scale (Q S + P u) of one chunk, for one head and BV of its columns. Where p_bounds do not rise from 0 to T,
    all of o is NaN."""
    pid = tl.program_id(0)
    i_v, pid = pid % tl.cdiv(V, BV), pid // tl.cdiv(V, BV)
    i_s, i_h = (pid // Hv).to(tl.int64), pid % Hv
    i_g = i_h * H // Hv  # the head of q and k
    o_c, o_v = tl.arange(0, C), i_v * BV + tl.arange(0, BV)
    i_t, end, valid = locate(p_bounds, i_s.to(tl.int32), T, N, C, PACKED)
    if valid == 0:
        o_tokens = i_s * C + o_c[:, None]
        b_o = tl.full([C, BV], float("nan"), dtype=tl.float32).to(p_o.dtype.element_ty)
        tl.store(p_o + (o_tokens * Hv + i_h) * V + o_v[None, :], b_o, mask=(o_tokens < T) & (o_v < V)[None, :])
        return
    if i_t >= end:
        return
    m_t, m_v = o_c < end - i_t, o_v < V
    m_tv = m_t[:, None] & m_v[None, :]
    o_tokens = i_t + o_c[:, None]
    i_sh = i_s * Hv + i_h
    b_o = tl.zeros([C, BV], dtype=tl.float32)
    b_P = tl.zeros([C, C], dtype=tl.float32)
    b_squares = tl.zeros([C], dtype=tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < K
        m_tk = m_t[:, None] & m_k[None, :]
        b_q = tl.load(p_q + o_tokens * q_stride + i_g * K + o_k[None, :], mask=m_tk, other=0.0)
        p_S = p_states + (i_sh * K + o_k[:, None]) * V + o_v[None, :]
        b_S = tl.load(p_S, mask=m_k[:, None] & m_v[None, :], other=0.0)
        b_o += product(b_q, b_S, PRECISION)
        if DECAY != VECTOR:
            b_k = tl.load(p_k + o_tokens * k_stride + i_g * K + o_k[None, :], mask=m_tk, other=0.0)
            b_P += product(b_q, tl.trans(b_k), PRECISION)
            if UNIT:
                b_q = b_q.to(tl.float32)
                b_squares += tl.sum(b_q * b_q, axis=1)
    m_lower = o_c[:, None] >= o_c[None, :]
    if DECAY == VECTOR:
        b_P = tl.load(p_pairs + i_sh * C * C + o_c[:, None] * C + o_c[None, :])
    else:
        b_g = sane(tl.load(p_decay + (i_t + o_c) * decay_stride + i_h, mask=m_t, other=0.0))
        b_o *= tl.exp(tl.cumsum(b_g, axis=0))[:, None]
        b_P = tl.where(m_lower, b_P * tl.exp(spans(b_g)), 0.0)
        if WEIGHTED:
            b_weight = tl.load(p_weight + (i_t + o_c) * weight_stride + i_h, mask=m_t, other=0.0).to(tl.float32)
            b_P = tl.where(m_lower, b_P * b_weight[None, :], 0.0)
    b_u = tl.load(p_u + o_tokens * u_stride + i_h * V + o_v[None, :], mask=m_tv, other=0.0)
    b_o += lower_product(b_P, b_u, PRECISION)
    if UNIT:
        b_o *= tl.rsqrt(b_squares + 1e-6)[:, None]
    tl.store(p_o + (o_tokens * Hv + i_h) * V + o_v[None, :], (scale * b_o).to(p_o.dtype.element_ty), mask=m_tv)
