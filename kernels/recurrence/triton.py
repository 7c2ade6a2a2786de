"""The Triton kernels of linear attention and of the delta rule: chunks for prefill and a step for decode,
one of each for all decays.

A program takes one head of one sequence and some columns of its state, which stays in registers from the first chunk to
the last; nothing but inputs and outputs is in the GPU's memory. Decays enter as exp(g_i - g_j) with i >= j, from sums
in float64, for a difference of large float32 sums is not exact.
"""

import torch
import triton
import triton.language as tl

from ..triton_common import OPTIONS

MAX_K = 256
SCALAR, VECTOR = 1, 2  # kinds of decay; none at all is a scalar 0 for every head


def config(K: int, V: int, dtype: torch.dtype, kind: int, delta: bool, hip: bool) -> dict[str, int | str]:
    """Constexprs of the chunk kernel for heads of K and V: as much as the registers hold on compute capability 9.0.

    Chunks of 32 tokens, or the 16 that tl.dot takes at least, where more is kept per chunk: for the delta rule, and
    where every component decays by itself (pairs of tokens are then added up one by one). Products of halves are in
    tf32, which is finer than they are, of float32 in float32.
    """
    exact, BK = dtype == torch.float32, max(16, triton.next_power_of_2(K))
    return {
        "C": 16 if exact or delta or kind == VECTOR or BK > 128 else 32,
        "BK": BK,
        "BV": min(16 if exact or BK > 128 else 32, max(16, triton.next_power_of_2(V))),
        "DECAY": kind,
        "PRECISION": "ieee" if exact or hip else "tf32",
    }


def step_config(K: int, V: int, kind: int) -> dict[str, int]:
    """Constexprs of the step kernel."""
    BK = max(16, triton.next_power_of_2(K))
    return {"BK": BK, "BV": min(2048 // BK, max(8, triton.next_power_of_2(V))), "DECAY": kind}


def num_warps(tile: dict, hip: bool) -> int:
    """256 threads where heads are wide, else 128."""
    return (8 if tile["BK"] > 64 else 4) // (2 if hip else 1)


@triton.jit
def sane(b_g):
    """Decays whose sums can be subtracted: exp(-800) is 0, like exp(-inf). What is positive is no decay."""
    return tl.where(b_g > 0, float("nan"), tl.where(b_g < -800.0, -800.0, b_g))


@triton.jit
def rounded(b_x):
    """To the nearest tf32, ties away from zero. NaN stays NaN, whatever its bits."""
    b_bits = (b_x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(b_x == b_x, b_bits.to(tl.float32, bitcast=True), b_x)


@triton.jit
def product(b_x, b_y, PRECISION: tl.constexpr, ROUND: tl.constexpr):
    """x y in fp32, of operands that are rounded first or, as tensor cores do it, cut off to tf32."""
    if ROUND:
        b_x, b_y = rounded(b_x), rounded(b_y)
    return tl.dot(b_x, b_y, input_precision=PRECISION)


@triton.jit
def chunks_kernel(
    p_o,  # [tokens, Hv, V]
    p_q,  # [tokens, H, K]
    p_k,  # [tokens, H, K]
    p_v,  # [tokens, Hv, V]
    p_beta,  # [tokens, Hv] fp32
    p_decay,  # [tokens or 1, Hv, (K)] fp32
    p_initial,  # [N, Hv, K, V] fp32
    p_final,  # [N, Hv, K, V] fp32
    p_bounds,  # [N + 1] int64
    scale,
    H,
    Hv,
    K,
    V,
    decay_stride,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    PRECISION: tl.constexpr,
    DELTA: tl.constexpr,
    UNIT: tl.constexpr,
    USE_INITIAL: tl.constexpr,
):
    """o and the final states of whole sequences."""
    # The delta rule feeds back what it read: what is always cut off adds up there, from chunk to chunk. Elsewhere it
    # stays below 0.2 %.
    ROUND: tl.constexpr = DELTA and PRECISION == "tf32"
    i_nh = tl.program_id(1).to(tl.int64)
    i_n, i_h = i_nh // Hv, i_nh % Hv
    i_g = i_h * H // Hv  # the head of q and k
    o_c, o_k = tl.arange(0, C), tl.arange(0, BK)
    o_v = tl.program_id(0) * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    m_kv = m_k[:, None] & m_v[None, :]
    m_lower = o_c[:, None] >= o_c[None, :]  # [C, C]
    # Offsets within a chunk or a state fit 32 bits, and stay in registers; where they begin takes 64.
    o_state = o_k[:, None] * V + o_v[None, :]  # [BK, BV]
    o_qk = o_c[:, None] * (H * K) + o_k[None, :]  # [C, BK]
    o_vo = o_c[:, None] * (Hv * V) + o_v[None, :]  # [C, BV]
    b_S = tl.zeros([BK, BV], dtype=tl.float32)
    if USE_INITIAL:
        b_S = tl.load(p_initial + i_nh * K * V + o_state, mask=m_kv, other=0.0)
    i_t = tl.load(p_bounds + i_n)
    end = tl.load(p_bounds + i_n + 1)
    while i_t < end:
        m_t = o_c < end - i_t
        m_tk = m_t[:, None] & m_k[None, :]
        m_tv = m_t[:, None] & m_v[None, :]
        b_q = tl.load(p_q + (i_t * H + i_g) * K + o_qk, mask=m_tk, other=0.0).to(tl.float32)
        b_k = tl.load(p_k + (i_t * H + i_g) * K + o_qk, mask=m_tk, other=0.0).to(tl.float32)
        b_u = tl.load(p_v + (i_t * Hv + i_h) * V + o_vo, mask=m_tv, other=0.0).to(tl.float32)
        if UNIT:
            b_q *= tl.rsqrt(tl.sum(b_q * b_q, axis=1) + 1e-6)[:, None]
            b_k *= tl.rsqrt(tl.sum(b_k * b_k, axis=1) + 1e-6)[:, None]
        b_beta = tl.zeros([C], dtype=tl.float32)
        if DELTA:
            b_beta = tl.load(p_beta + i_t * Hv + i_h + o_c * Hv, mask=m_t, other=0.0)

        # b_P = Q K^T and b_A = K K^T under the decays; b_since: K times its decay since the chunk began, b_until: until
        # it ends
        b_since, b_until = b_k, b_k
        b_A = tl.zeros([C, C], dtype=tl.float32)
        if DECAY == 2:
            b_g = tl.load(p_decay + (i_t * Hv + i_h) * K + o_c[:, None] * (Hv * K) + o_k[None, :], mask=m_tk, other=0.0)
            b_g = sane(b_g).to(tl.float64)
            b_all = tl.sum(b_g, axis=0)  # [BK]
            b_g = tl.cumsum(b_g, axis=0)
            b_P = tl.zeros([C, C], dtype=tl.float32)
            for j in range(C):
                m_j = (o_c == j)[:, None]  # [C, 1]
                b_kj = tl.sum(tl.where(m_j, b_k, 0.0), axis=0)
                b_gj = tl.sum(tl.where(m_j, b_g, 0.0), axis=0)
                b_exponent = tl.where((o_c >= j)[:, None], b_g - b_gj[None, :], 0.0)
                b_kj = b_kj[None, :] * tl.exp(b_exponent.to(tl.float32))  # [C, BK]
                m_column = (o_c == j)[None, :]
                b_P = tl.where(m_column, tl.sum(b_q * b_kj, axis=1)[:, None], b_P)
                if DELTA:
                    b_A = tl.where(m_column, tl.sum(b_k * b_kj, axis=1)[:, None], b_A)
            b_decay = tl.exp(b_g.to(tl.float32))
            b_q *= b_decay
            b_since = b_k * b_decay
            b_until = b_k * tl.exp((b_all[None, :] - b_g).to(tl.float32))
            b_kept = tl.exp(b_all.to(tl.float32))[:, None]  # [BK, 1]
        else:
            b_P = product(b_q, tl.trans(b_k), PRECISION, ROUND)
            if DELTA:
                b_A = product(b_k, tl.trans(b_k), PRECISION, ROUND)
            b_g = tl.load(p_decay + i_t * decay_stride + i_h + o_c * decay_stride, mask=m_t, other=0.0)
            b_g = sane(b_g).to(tl.float64)
            b_all = tl.sum(b_g, axis=0)
            b_g = tl.cumsum(b_g, axis=0)
            b_exponent = tl.where(m_lower, b_g[:, None] - b_g[None, :], 0.0)
            b_between = tl.exp(b_exponent.to(tl.float32))  # [C, C]
            b_P *= b_between
            b_A *= b_between
            b_decay = tl.exp(b_g.to(tl.float32))[:, None]
            b_q *= b_decay
            b_since = b_k * b_decay
            b_until = b_k * tl.exp((b_all - b_g).to(tl.float32))[:, None]
            b_kept = tl.zeros([1, 1], dtype=tl.float32) + tl.exp(b_all.to(tl.float32))
        b_P = tl.where(m_lower, b_P, 0.0)

        if DELTA:
            # (I + A) u = beta (v - K S): the inverse of I + A, less I, row by row (strictly lower)
            b_A = tl.where(o_c[:, None] > o_c[None, :], -b_beta[:, None] * b_A, 0.0)
            for i in range(1, C):
                m_i = (o_c == i)[:, None]
                b_row = tl.sum(tl.where(m_i, b_A, 0.0), axis=0)  # [C]
                b_row += tl.sum(b_row[:, None] * b_A, axis=0)
                b_A = tl.where(m_i, b_row[None, :], b_A)
            b_u = b_beta[:, None] * (b_u - product(b_since, b_S, PRECISION, ROUND))
            b_u += product(b_A, b_u, PRECISION, ROUND)

        b_o = product(b_q, b_S, PRECISION, ROUND)
        b_o += product(b_P, b_u, PRECISION, ROUND)
        tl.store(p_o + (i_t * Hv + i_h) * V + o_vo, (scale * b_o).to(p_o.dtype.element_ty), mask=m_tv)
        b_S = b_kept * b_S + product(tl.trans(b_until), b_u, PRECISION, ROUND)
        i_t += C
    tl.store(p_final + i_nh * K * V + o_state, b_S, mask=m_kv)


@triton.jit
def step_kernel(
    p_o,  # [B, T, Hv, V]
    p_q,  # [B, T, H, K]
    p_k,  # [B, T, H, K]
    p_v,  # [B, T, Hv, V]
    p_beta,  # [B, T, Hv] fp32
    p_decay,  # [B, T, Hv, (K)] or [1, 1, Hv] fp32
    p_state,  # [B, Hv, K, V] fp32, updated
    scale,
    T,
    H,
    Hv,
    K,
    V,
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
):
    """A few tokens of every row, one after the other, on some columns of the state."""
    i_bh = tl.program_id(1).to(tl.int64)
    i_b, i_h = i_bh // Hv, i_bh % Hv
    i_g = i_h * H // Hv
    o_k = tl.arange(0, BK)
    o_v = tl.program_id(0) * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    m_kv = m_k[:, None] & m_v[None, :]
    o_state = (
        i_b * stride_row
        + i_h * stride_head
        + o_k.to(tl.int64)[:, None] * stride_k
        + o_v.to(tl.int64)[None, :] * stride_v
    )
    b_S = tl.load(p_state + o_state, mask=m_kv, other=0.0)  # [BK, BV]
    i_t = 0
    while i_t < T:
        i_token = i_b * T + i_t
        b_q = tl.load(p_q + (i_token * H + i_g) * K + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_k = tl.load(p_k + (i_token * H + i_g) * K + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_u = tl.load(p_v + (i_token * Hv + i_h) * V + o_v, mask=m_v, other=0.0).to(tl.float32)
        if UNIT:
            b_q *= tl.rsqrt(tl.sum(b_q * b_q, axis=0) + 1e-6)
            b_k *= tl.rsqrt(tl.sum(b_k * b_k, axis=0) + 1e-6)
        if DECAY == 2:
            b_g = tl.load(p_decay + (i_token * Hv + i_h) * K + o_k, mask=m_k, other=0.0)
            b_S *= tl.exp(sane(b_g))[:, None]
        else:
            b_S *= tl.exp(sane(tl.load(p_decay + i_token * decay_stride + i_h)))
        if DELTA:
            b_beta = tl.load(p_beta + i_token * Hv + i_h)
            b_u = b_beta * (b_u - tl.sum(b_S * b_k[:, None], axis=0))
        b_S += b_k[:, None] * b_u[None, :]
        b_o = scale * tl.sum(b_S * b_q[:, None], axis=0)
        tl.store(p_o + (i_token * Hv + i_h) * V + o_v, b_o.to(p_o.dtype.element_ty), mask=m_v)
        i_t += 1
    tl.store(p_state + o_state, b_S, mask=m_kv)


def launch(q, k, v, beta, decay, scale, initial_state, l2_norm, bounds) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole sequences: beta is None for linear attention. Arguments and results as in the operators'
    references, without a normaliser."""
    q, k, v, beta, decay = _prepared(q, k, v, beta, decay)
    (B, T, H, K), (Hv, V), hip = q.shape, v.shape[2:], torch.version.hip is not None
    if bounds is None:
        edges = torch.arange(0, (B + 1) * T, T, device=q.device)
    else:
        edges = torch.tensor(bounds, device=q.device)
    N = edges.numel() - 1
    initial = None if initial_state is None else initial_state.contiguous()
    o = torch.empty_like(v)
    final = torch.empty(N, Hv, K, V, dtype=torch.float32, device=q.device)
    tile = config(K, V, q.dtype, _kind(decay), beta is not None, hip)
    with torch.cuda.device_of(q):
        chunks_kernel[(triton.cdiv(V, tile["BV"]), N * Hv)](
            o,
            q,
            k,
            v,
            beta,
            decay,
            initial,
            final,
            edges,
            scale,
            H,
            Hv,
            K,
            V,
            _stride(decay),
            **tile,
            DELTA=beta is not None,
            UNIT=l2_norm,
            USE_INITIAL=initial is not None,
            num_warps=num_warps(tile, hip),
            **OPTIONS,
        )
    return o, final


def step(q, k, v, beta, state, decay, scale, l2_norm) -> torch.Tensor:
    """A few tokens that continue `state`, which is updated in place."""
    q, k, v, beta, decay = _prepared(q, k, v, beta, decay)
    (B, T, H, K), (Hv, V), hip = q.shape, v.shape[2:], torch.version.hip is not None
    o = torch.empty_like(v)
    tile = step_config(K, V, _kind(decay))
    with torch.cuda.device_of(q):
        step_kernel[(triton.cdiv(V, tile["BV"]), B * Hv)](
            o,
            q,
            k,
            v,
            beta,
            decay,
            state,
            scale,
            T,
            H,
            Hv,
            K,
            V,
            _stride(decay),
            *state.stride(),
            **tile,
            DELTA=beta is not None,
            UNIT=l2_norm,
            num_warps=num_warps(tile, hip),
            **OPTIONS,
        )
    return o


def _prepared(q, k, v, beta, decay):
    K = q.shape[3]
    if K > MAX_K:
        raise ValueError(f"q: expected K of at most {MAX_K} on a GPU, got K = {K}")
    if decay is None:
        decay = q.new_zeros(v.shape[2], dtype=torch.float32)
    floats = (None if x is None else x.float().contiguous() for x in (beta, decay))
    return q.contiguous(), k.contiguous(), v.contiguous(), *floats


def _kind(decay) -> int:
    return VECTOR if decay.dim() == 4 else SCALAR


def _stride(decay) -> int:
    """Elements between tokens in a decay per head, 0 if it is the same for all."""
    return 0 if decay.dim() == 1 else decay.shape[2]
