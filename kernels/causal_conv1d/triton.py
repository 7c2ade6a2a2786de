"""Triton: a short depthwise causal convolution, bias and SiLU in one pass; and its step,
which shifts the state in place.

A tile loads its inputs W times, one token apart: the first load fetches them, the others hit the first cache. Tiles are
long in the direction that is contiguous in memory, so that neither layout needs a transposing copy.
"""

from itertools import pairwise

import torch
import triton
import triton.language as tl

from ..triton_common import NUM_WARPS, OPTIONS, silu

TILES = {True: {"BT": 16, "BD": 128}, False: {"BT": 64, "BD": 16}}  # by whether channels are contiguous


@triton.jit(do_not_specialize=["T", "blocks"])
def causal_conv1d_kernel(
    p_y,  # [B, D, T]
    p_x,  # [B, D, T]
    p_weight,  # [D, W]
    p_bias,  # [D] or None
    p_initial,  # [N, D, W - 1] or None
    p_bounds,  # [N + 1] int32 or None
    p_blocks,  # [programs along T, 2] int32 or None: the sequence of a program, and which block of it
    T,
    D,
    blocks,  # of BT tokens in a row
    s_yb,
    s_yd,
    s_yt,
    s_xb,
    s_xd,
    s_xt,
    W: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    USE_SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    IS_PACKED: tl.constexpr,
):
    """One program: BT tokens of one sequence, BD channels."""
    i_p, i_d = tl.program_id(0), tl.program_id(1)
    if IS_PACKED:
        i_n, i_t, i_b = tl.load(p_blocks + 2 * i_p), tl.load(p_blocks + 2 * i_p + 1), 0
        begin = tl.load(p_bounds + i_n)
        length = tl.load(p_bounds + i_n + 1) - begin
    else:
        i_n, i_t, i_b, begin, length = i_p // blocks, i_p % blocks, i_p // blocks, 0, T
    o_t = i_t * BT + tl.arange(0, BT)[:, None]  # [BT, 1], from the beginning of the sequence
    o_d = i_d * BD + tl.arange(0, BD)[None, :]  # [1, BD]
    m_d = o_d < D
    m_y = (o_t < length) & m_d
    first = tl.cast(begin, tl.int64)
    p_x += tl.cast(i_b, tl.int64) * s_xb + first * s_xt + o_d.to(tl.int64) * s_xd
    p_y += tl.cast(i_b, tl.int64) * s_yb + first * s_yt + o_d.to(tl.int64) * s_yd
    b_y = tl.zeros([BT, BD], dtype=tl.float32)
    if HAS_BIAS:
        b_y += tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    for w in tl.static_range(W):
        o_s = o_t + (w - (W - 1))
        b_x = tl.load(p_x + o_s.to(tl.int64) * s_xt, mask=m_y & (o_s >= 0), other=0.0).to(tl.float32)
        if HAS_INITIAL:
            p_before = p_initial + (tl.cast(i_n, tl.int64) * D + o_d) * (W - 1) + (o_s + (W - 1))
            b_x += tl.load(p_before, mask=m_y & (o_s < 0), other=0.0).to(tl.float32)
        b_y += b_x * tl.load(p_weight + o_d * W + w, mask=m_d, other=0.0).to(tl.float32)
    if USE_SILU:
        b_y = silu(b_y)
    tl.store(p_y + o_t.to(tl.int64) * s_yt, b_y.to(p_y.dtype.element_ty), mask=m_y)


@triton.jit(do_not_specialize=["T", "S"])
def causal_conv1d_update_kernel(
    p_y,  # [B, D, T], contiguous
    p_x,  # [B, D, T]
    p_state,  # [B, D, S]
    p_weight,  # [D, W]
    p_bias,  # [D] or None
    T,
    D,
    S,
    s_xb,
    s_xd,
    s_xt,
    s_sb,
    s_sd,
    s_ss,
    W: tl.constexpr,
    BD: tl.constexpr,
    BS: tl.constexpr,
    USE_SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """One program: BD channels of one row; every input is read before the state is written."""
    i_d, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_d = i_d * BD + tl.arange(0, BD)  # [BD]
    m_d = o_d < D
    p_x += i_b * s_xb + o_d.to(tl.int64) * s_xd
    p_state += i_b * s_sb + o_d.to(tl.int64) * s_sd
    p_y += (i_b * D + o_d) * T
    o_s = tl.arange(0, BS)[None, :]  # [1, BS]
    o_from = o_s + T  # in what the state and x are together
    m_s = m_d[:, None] & (o_s < S)
    b_old = tl.load(p_state[:, None] + o_from.to(tl.int64) * s_ss, mask=m_s & (o_from < S), other=0.0)
    b_new = tl.load(p_x[:, None] + (o_from - S).to(tl.int64) * s_xt, mask=m_s & (o_from >= S), other=0.0)
    b_bias = tl.zeros([BD], dtype=tl.float32)
    if HAS_BIAS:
        b_bias += tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    t = 0
    while t < T:
        b_y = b_bias
        for w in tl.static_range(W):
            o_at = tl.zeros([BD], dtype=tl.int32) + t + (w - (W - 1))
            b_x = tl.load(p_x + o_at.to(tl.int64) * s_xt, mask=m_d & (o_at >= 0), other=0.0).to(tl.float32)
            p_before = p_state + (S + o_at).to(tl.int64) * s_ss
            b_x += tl.load(p_before, mask=m_d & (o_at < 0), other=0.0).to(tl.float32)
            b_y += b_x * tl.load(p_weight + o_d * W + w, mask=m_d, other=0.0).to(tl.float32)
        if USE_SILU:
            b_y = silu(b_y)
        tl.store(p_y + t, b_y.to(p_y.dtype.element_ty), mask=m_d)
        t += 1
    tl.debug_barrier()  # other threads of this program read the same channels
    tl.store(p_state[:, None] + o_s.to(tl.int64) * s_ss, tl.where(o_from < S, b_old, b_new), mask=m_s)


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu: bool,
    initial_state: torch.Tensor | None,
    bounds: list[int] | None,
) -> torch.Tensor:
    """x [B, D, T] of any strides, weight [D, W], bias [D], initial_state [N, D, W - 1] -> y [B, D, T]
    in the layout of x."""
    (B, D, T), W = x.shape, weight.shape[1]
    channels_last = x.stride(1) == 1
    tile = TILES[channels_last]
    if channels_last:
        y = torch.empty(B, T, D, dtype=x.dtype, device=x.device).transpose(1, 2)
    else:
        y = torch.empty(B, D, T, dtype=x.dtype, device=x.device)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    initial = None if initial_state is None or W == 1 else initial_state.contiguous()
    blocks, packed, pieces = triton.cdiv(T, tile["BT"]), None, None
    programs = B * blocks
    if bounds is not None:
        lengths = [end - begin for begin, end in pairwise(bounds)]
        pairs = [(n, i) for n, length in enumerate(lengths) for i in range(triton.cdiv(length, tile["BT"]))]
        packed = torch.tensor(bounds, dtype=torch.int32, device=x.device)
        pieces, programs = torch.tensor(pairs, dtype=torch.int32, device=x.device), len(pairs)
    with torch.cuda.device_of(x):
        causal_conv1d_kernel[(programs, triton.cdiv(D, tile["BD"]))](
            y,
            x,
            weight,
            bias,
            initial,
            packed,
            pieces,
            T,
            D,
            blocks,
            *y.stride(),
            *x.stride(),
            W=W,
            **tile,
            USE_SILU=silu,
            HAS_BIAS=bias is not None,
            HAS_INITIAL=initial is not None,
            IS_PACKED=bounds is not None,
            num_warps=NUM_WARPS,
            **OPTIONS,
        )
    return y


def update_tile(S: int) -> dict[str, int]:
    """Constexprs of the step for a state of S inputs."""
    BS = triton.next_power_of_2(S)
    return {"BD": max(1, min(128, 4096 // BS)), "BS": BS}


def update(
    x: torch.Tensor, state: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, silu: bool
) -> torch.Tensor:
    """x [B, D, T], state [B, D, S], of any strides, weight [D, W], bias [D] -> y [B, D, T], contiguous;
    the state is shifted in place."""
    (B, D, T), S = x.shape, state.shape[2]
    y = torch.empty(B, D, T, dtype=x.dtype, device=x.device)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    tile = update_tile(max(S, 1))
    with torch.cuda.device_of(x):
        causal_conv1d_update_kernel[(triton.cdiv(D, tile["BD"]), B)](
            y,
            x,
            state,
            weight,
            bias,
            T,
            D,
            S,
            *x.stride(),
            *state.stride(),
            W=weight.shape[1],
            **tile,
            USE_SILU=silu,
            HAS_BIAS=bias is not None,
            num_warps=NUM_WARPS,
            **OPTIONS,
        )
    return y
