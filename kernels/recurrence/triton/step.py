"""A few tokens that continue a state: decode."""

import triton
import triton.language as tl

from .arithmetic import VECTOR, sane


@triton.jit
def step_kernel(
    p_o,  # [B, T, Hv, V]
    p_q,  # [B, T, H, K]
    p_k,  # [B, T, H, K]
    p_v,  # [B, T, Hv, V]
    p_beta,  # [B, T, Hv] or None
    p_decay,  # [B, T, Hv, (K)], [Hv] or None
    p_state,  # [B, Hv, K, V] fp32, updated
    scale,
    T,
    H,
    Hv,
    K,
    V,
    q_stride,
    k_stride,
    v_stride,
    beta_stride,
    decay_stride,
    stride_row,
    stride_head,
    stride_k,
    stride_v,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    DELTA: tl.constexpr,
    UNIT: tl.constexpr,
    USE_BETA: tl.constexpr,
):
    """The tokens of one head of one row, one after the other, on BV columns of its state."""
    pid = tl.program_id(0)
    i_v, i_bh = pid % tl.cdiv(V, BV), (pid // tl.cdiv(V, BV)).to(tl.int64)
    i_b, i_h = i_bh // Hv, i_bh % Hv
    i_g = i_h * H // Hv
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    m_kv = m_k[:, None] & m_v[None, :]
    o_state = (
        i_b * stride_row
        + i_h * stride_head
        + o_k.to(tl.int64)[:, None] * stride_k
        + o_v.to(tl.int64)[None, :] * stride_v
    )
    b_S = tl.load(p_state + o_state, mask=m_kv, other=0.0)  # [BK, BV]
    for i_t in range(0, T):
        i_token = i_b * T + i_t
        b_q = tl.load(p_q + i_token * q_stride + i_g * K + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_k = tl.load(p_k + i_token * k_stride + i_g * K + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_u = tl.load(p_v + i_token * v_stride + i_h * V + o_v, mask=m_v, other=0.0).to(tl.float32)
        if UNIT:
            b_q *= tl.rsqrt(tl.sum(b_q * b_q, axis=0) + 1e-6)
            b_k *= tl.rsqrt(tl.sum(b_k * b_k, axis=0) + 1e-6)
        if DECAY == VECTOR:
            b_g = tl.load(p_decay + i_token * decay_stride + i_h * K + o_k, mask=m_k, other=0.0)
            b_S *= tl.exp(sane(b_g))[:, None]
        elif DECAY:
            b_S *= tl.exp(sane(tl.load(p_decay + i_token * decay_stride + i_h)))
        if DELTA:
            b_u -= tl.sum(b_S * b_k[:, None], axis=0)
        if USE_BETA:
            b_u *= tl.load(p_beta + i_token * beta_stride + i_h).to(tl.float32)
        b_S += b_k[:, None] * b_u[None, :]
        b_o = scale * tl.sum(b_S * b_q[:, None], axis=0)
        tl.store(p_o + (i_token * Hv + i_h) * V + o_v, b_o.to(p_o.dtype.element_ty), mask=m_v)
    tl.store(p_state + o_state, b_S, mask=m_kv)
