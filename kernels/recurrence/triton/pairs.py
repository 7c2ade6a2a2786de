"""What decays per component do within a chunk: weights of pairs of tokens, and q and k decayed (GLA, HGRN2, KDA)."""

import triton
import triton.language as tl

from .arithmetic import across, decline, locate, product, sane


@triton.jit(do_not_specialize=["T", "N"])
def pairs_kernel(
    p_pairs,  # [slots, Hv, C, C]: q_i . k_j under the decay between them, times beta_j where it is not None
    p_keys,  # [slots, Hv, C, C] fp32: k_i . k_j under the decay between them, for i > j, for the delta rule
    p_read,  # [tokens, Hv, K]: q decayed since its chunk began
    p_since,  # [tokens, Hv, K]: k decayed since its chunk began, for the delta rule
    p_until,  # [tokens, Hv, K]: k decayed until its chunk ends, times beta where it is not None
    p_lost,  # [slots, Hv, K] fp32: exp(decay of the chunk) - 1
    p_q,  # [tokens, H, K]
    p_k,  # [tokens, H, K]
    p_decay,  # [tokens, Hv, K]
    p_beta,  # [tokens, Hv] or None, for linear attention
    p_bounds,  # [N + 1] or None
    T,
    N,
    H,
    Hv,
    K,
    q_stride,
    k_stride,
    decay_stride,
    beta_stride,
    C: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
    SOLVE_PRECISION: tl.constexpr,
    DELTA: tl.constexpr,
    UNIT: tl.constexpr,
    USE_BETA: tl.constexpr,
    PACKED: tl.constexpr,
):
    """One chunk of one head.

    Decays per component do not factor out of sum_c q[i, c] k[j, c] exp(g[i, c] - g[j, c]). Between the second and the
    first half of a block they do, relative to the middle, and neither factor exceeds 1; the halves are blocks of their
    own, and tokens with themselves are left. The exponents of a halving are sums of logarithms, too, and so a product
    with a matrix of 0 and 1.
    """
    i_s, i_h = (tl.program_id(0) // Hv).to(tl.int64), tl.program_id(0) % Hv
    i_g = i_h * H // Hv  # the head of q and k
    i_t, end, valid = locate(p_bounds, i_s.to(tl.int32), T, N, C, PACKED)
    if (i_t >= end) | (valid == 0):
        return
    o_c = tl.arange(0, C)
    m_t = o_c < end - i_t
    o_tokens = i_t + o_c[:, None]
    m_next = (o_c + 1 < end - i_t) & (o_c + 1 < C)
    i_sh = i_s * Hv + i_h
    if UNIT:
        b_q2 = tl.zeros([C], dtype=tl.float32)
        b_k2 = tl.zeros([C], dtype=tl.float32)
        for i_k in range(0, K, BK):
            o_k = i_k + tl.arange(0, BK)
            m_tk = m_t[:, None] & (o_k < K)[None, :]
            b_q = tl.load(p_q + o_tokens * q_stride + i_g * K + o_k[None, :], mask=m_tk, other=0.0).to(tl.float32)
            b_k = tl.load(p_k + o_tokens * k_stride + i_g * K + o_k[None, :], mask=m_tk, other=0.0).to(tl.float32)
            b_q2 += tl.sum(b_q * b_q, axis=1)
            b_k2 += tl.sum(b_k * b_k, axis=1)
        b_q2, b_k2 = tl.rsqrt(b_q2 + 1e-6), tl.rsqrt(b_k2 + 1e-6)
    if USE_BETA:
        b_beta = tl.load(p_beta + (i_t + o_c) * beta_stride + i_h, mask=m_t, other=0.0).to(tl.float32)
    # Each of the loops keeps few tiles in registers; what they load again comes from caches.
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = (o_k < K)[None, :]
        m_tk = m_t[:, None] & m_k
        o_rows = (o_tokens * Hv + i_h) * K + o_k[None, :]
        p_g = p_decay + o_tokens * decay_stride + i_h * K + o_k[None, :]
        b_g = sane(tl.load(p_g, mask=m_tk, other=0.0))
        b_q = tl.load(p_q + o_tokens * q_stride + i_g * K + o_k[None, :], mask=m_tk, other=0.0).to(tl.float32)
        b_k = tl.load(p_k + o_tokens * k_stride + i_g * K + o_k[None, :], mask=m_tk, other=0.0).to(tl.float32)
        if UNIT:
            b_q *= b_q2[:, None]
            b_k *= b_k2[:, None]
        b_since = tl.exp(tl.cumsum(b_g, axis=0))
        tl.store(p_read + o_rows, (b_q * b_since).to(p_read.dtype.element_ty), mask=m_tk)
        if DELTA:
            tl.store(p_since + o_rows, (b_k * b_since).to(p_since.dtype.element_ty), mask=m_tk)
        tl.store(p_lost + i_sh * K + o_k, decline(tl.sum(b_g, axis=0)), mask=o_k < K)
        b_next = sane(tl.load(p_g + decay_stride, mask=m_next[:, None] & m_k, other=0.0))
        b_until = b_k * tl.exp(tl.cumsum(b_next, axis=0, reverse=True))
        if USE_BETA:
            b_until *= b_beta[:, None]
        tl.store(p_until + o_rows, b_until.to(p_until.dtype.element_ty), mask=m_tk)
    b_P = tl.zeros([C, C], dtype=tl.float32)
    b_A = tl.zeros([C, C], dtype=tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        m_tk = m_t[:, None] & (o_k < K)[None, :]
        b_g = sane(tl.load(p_decay + o_tokens * decay_stride + i_h * K + o_k[None, :], mask=m_tk, other=0.0))
        b_q = tl.load(p_q + o_tokens * q_stride + i_g * K + o_k[None, :], mask=m_tk, other=0.0)
        b_k = tl.load(p_k + o_tokens * k_stride + i_g * K + o_k[None, :], mask=m_tk, other=0.0)
        b_own = tl.sum(b_q.to(tl.float32) * b_k.to(tl.float32), axis=1)
        b_P += tl.where(o_c[:, None] == o_c[None, :], b_own[:, None], 0.0)
        half = C // 2
        while half > 0:
            # The tokens between the middle and i: those after it up to i, or those after i up to it.
            o_half = o_c // half
            m_own = o_half[:, None] == o_half[None, :]
            m_sum = m_own & ((o_half % 2 == 1)[:, None] == (o_c[None, :] <= o_c[:, None]))
            b_factor = tl.exp(product(m_sum.to(tl.float32), b_g, PRECISION))
            b_decayed = b_k * b_factor
            m_pairs = across(o_c, half)
            b_P += tl.where(m_pairs, product(b_q * b_factor, tl.trans(b_decayed), PRECISION), 0.0)
            if DELTA:
                b_A += tl.where(m_pairs, product(b_decayed, tl.trans(b_decayed), SOLVE_PRECISION), 0.0)
            half //= 2
    m_lower = o_c[:, None] >= o_c[None, :]
    if UNIT:
        b_P = tl.where(m_lower, b_P * (b_q2[:, None] * b_k2[None, :]), 0.0)
        b_A = tl.where(m_lower, b_A * (b_k2[:, None] * b_k2[None, :]), 0.0)
    if USE_BETA:
        b_P = tl.where(m_lower, b_P * b_beta[None, :], 0.0)
    o_pairs = i_sh * C * C + o_c[:, None] * C + o_c[None, :]
    tl.store(p_pairs + o_pairs, b_P.to(p_pairs.dtype.element_ty))
    if DELTA:
        tl.store(p_keys + o_pairs, b_A)
