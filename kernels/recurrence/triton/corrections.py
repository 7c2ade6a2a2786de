"""The delta rule within a chunk (WY form; Yang et al. 2024, arXiv 2406.06484 and 2412.06464)."""

import triton
import triton.language as tl

from .arithmetic import VECTOR, across, decline, locate, lower_product, product, sane, spans
from .states import until


@triton.jit
def inverse(b_A, PRECISION: tl.constexpr):
    """(I + A)^-1 of a strictly lower triangle A [C, C], by doubling: the inverse of a block of 2 half tokens from
    those X of its halves, for [[I + A1, 0], [B, I + A2]]^-1 = [[X1, 0], [-X2 B X1, X2]].

    The powers of A, which a product of I + A^2^n would need, may be large where the inverse is not.
    """
    C: tl.constexpr = b_A.shape[0]
    o_c = tl.arange(0, C)
    b_X = tl.where(o_c[:, None] == o_c[None, :], 1.0, tl.where(across(o_c, 1), -b_A, 0.0))
    half = 2
    while half < C:
        b_B = tl.where(across(o_c, half), b_A, 0.0)
        b_X -= product(b_X, product(b_B, b_X, PRECISION), PRECISION)
        half *= 2
    return b_X


@triton.jit(do_not_specialize=["T", "N"])
def corrections_kernel(
    p_u,  # [tokens, Hv, V]: (I + A)^-1 beta V
    p_w,  # [tokens, Hv, K]: (I + A)^-1 beta K, k decayed since the chunk began
    p_until,  # [tokens, Hv] fp32: weights of tokens in the state after the chunk, with one decay per head, and so are
    p_weight,  # [tokens, Hv] fp32: 1 / length of k, where UNIT
    p_lost,  # [slots, Hv] fp32: exp(decay of the chunk) - 1
    p_k,  # [tokens, H, K]; where components decay by themselves [tokens, Hv, K], decayed since the chunk began
    p_v,  # [tokens, Hv, V]
    p_keys,  # [slots, Hv, C, C] fp32: k_i . k_j under the decay between them, where components decay by themselves
    p_beta,  # [tokens, Hv]
    p_decay,  # [tokens or 1, Hv], with one decay per head
    p_bounds,  # [N + 1] or None
    T,
    N,
    H,
    Hv,
    K,
    V,
    k_stride,
    v_stride,
    beta_stride,
    decay_stride,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    PRECISION: tl.constexpr,
    SOLVE_PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    PACKED: tl.constexpr,
):
    """What the tokens of a chunk write is u - w S with the state S before the chunk; A_ij = beta_i k_i . k_j under the
    decay between them, for i > j. A program takes one chunk of one head."""
    i_s, i_h = (tl.program_id(0) // Hv).to(tl.int64), tl.program_id(0) % Hv
    i_g = i_h * H // Hv  # the head of k
    i_t, end, valid = locate(p_bounds, i_s.to(tl.int32), T, N, C, PACKED)
    if (i_t >= end) | (valid == 0):
        return
    o_c = tl.arange(0, C)
    m_t = o_c < end - i_t
    o_tokens = i_t + o_c[:, None]
    i_sh = i_s * Hv + i_h
    b_beta = tl.load(p_beta + (i_t + o_c) * beta_stride + i_h, mask=m_t, other=0.0).to(tl.float32)
    b_left = b_beta  # what a row of k is multiplied by for w
    if DECAY == VECTOR:
        b_A = tl.load(p_keys + i_sh * C * C + o_c[:, None] * C + o_c[None, :])
    else:
        b_A = tl.zeros([C, C], dtype=tl.float32)
        b_squares = tl.zeros([C], dtype=tl.float32)
        for i_k in range(0, K, BK):
            o_k = i_k + tl.arange(0, BK)
            m_tk = m_t[:, None] & (o_k < K)[None, :]
            b_k = tl.load(p_k + o_tokens * k_stride + i_g * K + o_k[None, :], mask=m_tk, other=0.0)
            b_A += product(b_k, tl.trans(b_k), PRECISION)
            if UNIT:
                b_k = b_k.to(tl.float32)
                b_squares += tl.sum(b_k * b_k, axis=1)
        p_own = p_decay + i_t * decay_stride + i_h
        b_g = sane(tl.load(p_own + o_c * decay_stride, mask=m_t, other=0.0))
        b_A *= tl.exp(spans(b_g))
        b_left *= tl.exp(tl.cumsum(b_g, axis=0))
        b_until = tl.exp(until(p_own, o_c, end - i_t, decay_stride))
        tl.store(p_lost + i_sh, decline(tl.sum(b_g, axis=0)))
        if UNIT:
            b_unit = tl.rsqrt(b_squares + 1e-6)
            b_A *= b_unit[:, None] * b_unit[None, :]
            b_left *= b_unit
            b_until *= b_unit
            tl.store(p_weight + (i_t + o_c) * Hv + i_h, b_unit, mask=m_t)
        tl.store(p_until + (i_t + o_c) * Hv + i_h, b_until, mask=m_t)
    m_strict = o_c[:, None] > o_c[None, :]
    b_A = tl.where(m_strict, b_A * b_beta[:, None], 0.0)
    # A token whose k or beta is not finite spoils what it and those after it write, and nothing before it.
    b_bad = tl.max(tl.where(tl.abs(b_A) < float("inf"), 0, 1), axis=1) | tl.where(tl.abs(b_left) < float("inf"), 0, 1)
    first = tl.min(tl.where(b_bad > 0, o_c, C), axis=0)
    m_good = o_c < first
    b_X = inverse(tl.where(m_good[:, None], b_A, 0.0), SOLVE_PRECISION)
    b_Xv = b_X * tl.where(m_good, b_beta, 0.0)[None, :]
    b_Xk = b_X * tl.where(m_good, b_left, 0.0)[None, :]
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        m_tv = m_t[:, None] & (o_v < V)[None, :]
        b_v = tl.load(p_v + o_tokens * v_stride + i_h * V + o_v[None, :], mask=m_tv, other=0.0)
        b_u = tl.where(m_good[:, None], lower_product(b_Xv, b_v, SOLVE_PRECISION), float("nan"))
        tl.store(p_u + (o_tokens * Hv + i_h) * V + o_v[None, :], b_u.to(p_u.dtype.element_ty), mask=m_tv)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        m_tk = m_t[:, None] & (o_k < K)[None, :]
        b_k = tl.load(p_k + o_tokens * k_stride + i_g * K + o_k[None, :], mask=m_tk & m_good[:, None], other=0.0)
        b_w = product(b_Xk, b_k, SOLVE_PRECISION)
        tl.store(p_w + (o_tokens * Hv + i_h) * K + o_k[None, :], b_w.to(p_w.dtype.element_ty), mask=m_tk)
