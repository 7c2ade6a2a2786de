"""The states of linear attention and of the delta rule: the weights of keys in them, and their serial scan."""

import triton
import triton.language as tl

from .arithmetic import VECTOR, decline, locate, product, sane


@triton.jit(do_not_specialize=["T", "N"])
def weights_kernel(
    p_until,  # [tokens, Hv] fp32: weights of k v^T in the state after the chunk
    p_lost,  # [slots, Hv] fp32: exp(decay of the chunk) - 1
    p_decay,  # [tokens or 1, Hv]
    p_beta,  # [tokens, Hv] or None
    p_bounds,  # [N + 1] or None
    T,
    N,
    Hv,
    decay_stride,
    beta_stride,
    C: tl.constexpr,
    USE_BETA: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Linear attention with one decay per head; a program takes one chunk and one head."""
    i_s, i_h = tl.program_id(0) // Hv, tl.program_id(0) % Hv
    i_t, end, valid = locate(p_bounds, i_s, T, N, C, PACKED)
    if (i_t >= end) | (valid == 0):
        return
    o_c = tl.arange(0, C)
    m_t = o_c < end - i_t
    b_until = until(p_decay + i_t * decay_stride + i_h, o_c, end - i_t, decay_stride)
    b_first = sane(tl.load(p_decay + i_t * decay_stride + i_h))
    tl.store(p_lost + i_s.to(tl.int64) * Hv + i_h, decline(b_first + tl.sum(tl.where(o_c == 0, b_until, 0.0), axis=0)))
    b_until = tl.exp(b_until)
    if USE_BETA:
        b_until *= tl.load(p_beta + (i_t + o_c) * beta_stride + i_h, mask=m_t, other=0.0).to(tl.float32)
    tl.store(p_until + (i_t + o_c) * Hv + i_h, b_until, mask=m_t)


@triton.jit
def until(p_decay, o_c, left, stride):
    """Sums of the logarithms of the tokens after each of a chunk, [C], where `left` tokens are left of the sequence."""
    b_next = tl.load(p_decay + (o_c + 1) * stride, mask=(o_c + 1 < left) & (o_c + 1 < o_c.shape[0]), other=0.0)
    return tl.cumsum(sane(b_next), axis=0, reverse=True)


@triton.jit(do_not_specialize=["T", "N"])
def states_kernel(
    p_states,  # [slots, Hv, K, V]: the state before each chunk
    p_final,  # [N, Hv, K, V] fp32
    p_written,  # [tokens, Hv, V]: what the delta rule writes, u - W S
    p_k,  # [tokens, H, K]; where components decay by themselves [tokens, Hv, K], decayed until its chunk ends
    p_u,  # [tokens, Hv, V]
    p_w,  # [tokens, Hv, K] for the delta rule
    p_until,  # [tokens, Hv] fp32: the weights of tokens, where k is not decayed
    p_lost,  # [slots, Hv, (K)] fp32
    p_initial,  # [N, Hv, K, V] fp32 or None
    p_bounds,  # [N + 1] or None
    T,
    N,
    H,
    Hv,
    K,
    V,
    k_stride,
    u_stride,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    PRECISION: tl.constexpr,
    DELTA: tl.constexpr,
    USE_INITIAL: tl.constexpr,
    STAGES: tl.constexpr,
    PACKED: tl.constexpr,
):
    """A program takes BK x BV of one head's state through one sequence. The delta rule needs all of K: BK >= K."""
    pid = tl.program_id(0)
    i_v, pid = pid % tl.cdiv(V, BV), pid // tl.cdiv(V, BV)
    i_k, i_nh = pid % tl.cdiv(K, BK), (pid // tl.cdiv(K, BK)).to(tl.int64)
    i_n, i_h = i_nh // Hv, i_nh % Hv
    i_g = i_h * H // Hv  # the head of k
    o_c, o_k, o_v = tl.arange(0, C), i_k * BK + tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    m_kv = m_k[:, None] & m_v[None, :]
    o_state = o_k[:, None] * V + o_v[None, :]  # [BK, BV]
    i_s = tl.load(p_bounds + i_n).to(tl.int64) // C + i_n if PACKED else i_n * tl.cdiv(T, C)
    i_t, end, valid = locate(p_bounds, i_s.to(tl.int32), T, N, C, PACKED)
    b_S = tl.zeros([BK, BV], dtype=tl.float32)
    if USE_INITIAL:
        b_S = tl.load(p_initial + i_nh * K * V + o_state, mask=m_kv, other=0.0)
    chunks = tl.where(valid, (end - i_t + C - 1) // C, 0).to(tl.int32)
    b_S = tl.where(valid, b_S, float("nan"))
    for _ in tl.range(0, chunks, num_stages=STAGES):
        i_sh = i_s * Hv + i_h
        m_t = o_c < end - i_t
        m_tk, m_tv = m_t[:, None] & m_k[None, :], m_t[:, None] & m_v[None, :]
        o_tokens = i_t + o_c[:, None]
        if DECAY == VECTOR:
            b_lost = tl.load(p_lost + i_sh * K + o_k, mask=m_k, other=0.0)[:, None]
        else:
            b_lost = tl.load(p_lost + i_sh)
            b_until = tl.load(p_until + (i_t + o_c) * Hv + i_h, mask=m_t, other=0.0)
        b_u = tl.load(p_u + o_tokens * u_stride + i_h * V + o_v[None, :], mask=m_tv, other=0.0)
        tl.store(p_states + i_sh * K * V + o_state, b_S.to(p_states.dtype.element_ty), mask=m_kv)
        if DELTA:
            b_w = tl.load(p_w + (o_tokens * Hv + i_h) * K + o_k[None, :], mask=m_tk, other=0.0)
            b_u = b_u.to(tl.float32) - product(b_w, b_S, PRECISION)
            o_written = (o_tokens * Hv + i_h) * V + o_v[None, :]
            tl.store(p_written + o_written, b_u.to(p_written.dtype.element_ty), mask=m_tv)
        if DECAY != VECTOR:
            b_u = b_u.to(tl.float32) * b_until[:, None]
        b_k = tl.load(p_k + o_tokens * k_stride + i_g * K + o_k[None, :], mask=m_tk, other=0.0)
        b_S += b_S * b_lost
        b_S += product(tl.trans(b_k), b_u, PRECISION)
        i_t += C
        i_s += 1
    tl.store(p_final + i_nh * K * V + o_state, b_S, mask=m_kv)
