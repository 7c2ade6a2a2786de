"""Triton: the selective scan, over whole sequences and as a step, in one kernel.

A program takes some channels of one sequence, whose states stay in registers from token to token; the next token is on
its way while one is computed. Where sequences and channels are too few for a GPU, sequences are cut into chunks: their
states from zeros first, then, serially but once per chunk, the states that they begin with, then their outputs.
"""

import torch
import triton
import triton.language as tl

from ...triton_common import OPTIONS, multiprocessors, silu

SHORTEST_CHUNK = 128  # tokens
PROGRAMS = 8  # of a multiprocessor
ELEMENTS = 512  # of a program's states, 8 per thread


def tile(N: int) -> dict[str, int]:
    """Constexprs for states of N components."""
    BN = triton.next_power_of_2(N)
    return {"BD": max(1, min(64, ELEMENTS // BN)), "BN": BN}


@triton.jit
def softplus(b_x):
    """log(1 + exp(x)) = max(x, 0) + 2 artanh(s), precise also where it is as small as exp(x)."""
    b_e = tl.exp(-tl.abs(b_x))
    b_s = b_e / (b_e + 2.0)
    b_square = b_s * b_s
    b_p = ((0.2801201045513153 * b_square + 0.28001800179481506) * b_square + 0.4002152681350708) * b_square
    return tl.where(b_x > 0, b_x, 0.0) + b_s * (2.0 + b_square * (b_p + 0.666664183139801))


@triton.jit
def decayed(b_h, b_exponent):
    """h 2^exponent. No bit of h is lost to a factor that is nearly 1 and rounded: 2^exponent is 2^whole (1 + rest).
    What is positive is no decay: NaN."""
    b_exponent = tl.where(b_exponent < -127.0, -127.0, tl.where(b_exponent > 0, float("nan"), b_exponent))
    b_whole = tl.floor(b_exponent + 0.5)
    b_f = b_exponent - b_whole
    b_p = (0.001326472731307149 * b_f + 0.009671512991189957) * b_f + 0.05550733581185341
    b_rest = ((b_p * b_f + 0.24022242426872253) * b_f + 0.6931470036506653) * b_f
    b_power = ((tl.where(b_whole == b_whole, b_whole, 0.0).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return (b_h * b_rest + b_h) * b_power


@triton.jit(do_not_specialize=["T", "chunks", "length"])
def scan_kernel(
    p_y,  # [B, T, D], or None where only states are wanted
    p_x,  # [B, T, D]
    p_dt,  # [B, T, D]
    p_A,  # [D, N] fp32
    p_B,  # [B, T, N]
    p_C,  # [B, T, N]
    p_D,  # [D] or None
    p_z,  # [B, T, D] or None
    p_bias,  # [D] or None
    p_initial,  # [sequences * chunks, D, N] fp32 or None
    p_final,  # [sequences * chunks, D, N] fp32 or None
    p_total,  # [sequences * chunks, D] fp32 or None: sums of dt
    p_bounds,  # [sequences + 1] int64 or None
    T,
    D,
    N,
    chunks,  # of a sequence
    length,  # of a chunk
    s_initial,  # between sequences
    s_final,
    s_xb,
    s_xt,
    s_xd,
    s_dtb,
    s_dtt,
    s_dtd,
    s_Bb,
    s_Bt,
    s_Bn,
    s_Cb,
    s_Ct,
    s_Cn,
    s_zb,
    s_zt,
    s_zd,
    BD: tl.constexpr,
    BN: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):
    """One program: BD channels of a chunk of a sequence."""
    STORE_Y: tl.constexpr = p_y is not None
    HAS_Z: tl.constexpr = p_z is not None
    blocks = tl.cdiv(D, BD)
    i_s, i_d = tl.program_id(0) // blocks, tl.program_id(0) % blocks  # of sequences and chunks, of channels
    i_n = i_s // chunks
    o_d, o_n = i_d * BD + tl.arange(0, BD), tl.arange(0, BN)
    m_d, m_n = o_d < D, o_n < N
    m_h = m_d[:, None] & m_n[None, :]
    o_h = o_d.to(tl.int64)[:, None] * N + o_n[None, :]  # [BD, BN]
    i_b, begin, end = i_n.to(tl.int64), 0, T
    if p_bounds is not None:  # whose values nobody has looked at
        i_b = tl.zeros([], dtype=tl.int64)
        begin = tl.maximum(tl.load(p_bounds + i_n), 0).to(tl.int32)
        end = tl.minimum(tl.load(p_bounds + i_n + 1), T).to(tl.int32)
    begin += i_s % chunks * length
    end = tl.minimum(end, begin + length)

    b_A = tl.load(p_A + o_h, mask=m_h, other=0.0) * 1.4426950408889634
    b_h = tl.zeros([BD, BN], dtype=tl.float32)
    if p_initial is not None:
        b_h += tl.load(p_initial + i_s.to(tl.int64) * s_initial + o_h, mask=m_h, other=0.0)
    b_total = tl.zeros([BD], dtype=tl.float32)
    b_bias, b_skip = tl.zeros([BD], dtype=tl.float32), tl.zeros([BD], dtype=tl.float32)
    if p_bias is not None:
        b_bias += tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    if p_D is not None:
        b_skip += tl.load(p_D + o_d, mask=m_d, other=0.0).to(tl.float32)

    t = begin
    first = tl.cast(begin, tl.int64)
    p_x += i_b * s_xb + first * s_xt + o_d.to(tl.int64) * s_xd
    p_dt += i_b * s_dtb + first * s_dtt + o_d.to(tl.int64) * s_dtd
    p_B += i_b * s_Bb + first * s_Bt + o_n.to(tl.int64) * s_Bn
    p_C += i_b * s_Cb + first * s_Ct + o_n.to(tl.int64) * s_Cn
    m_td, m_tn = o_d < tl.where(t < end, D, 0), o_n < tl.where(t < end, N, 0)
    b_next_x = tl.load(p_x, mask=m_td, other=0.0)
    b_next_dt = tl.load(p_dt, mask=m_td, other=0.0)
    b_next_B = tl.load(p_B, mask=m_tn, other=0.0)
    if STORE_Y:
        p_y += (i_b * T + first) * D + o_d
        b_next_C = tl.load(p_C, mask=m_tn, other=0.0)
    if STORE_Y and HAS_Z:
        p_z += i_b * s_zb + first * s_zt + o_d.to(tl.int64) * s_zd
        b_next_z = tl.load(p_z, mask=m_td, other=0.0)
    while t < end:
        b_x, b_B = b_next_x.to(tl.float32), b_next_B.to(tl.float32)
        b_dt = b_next_dt.to(tl.float32) + b_bias
        p_x += s_xt
        p_dt += s_dtt
        p_B += s_Bt
        m_td, m_tn = o_d < tl.where(t + 1 < end, D, 0), o_n < tl.where(t + 1 < end, N, 0)
        b_next_x = tl.load(p_x, mask=m_td, other=0.0)
        b_next_dt = tl.load(p_dt, mask=m_td, other=0.0)
        b_next_B = tl.load(p_B, mask=m_tn, other=0.0)
        if SOFTPLUS:
            b_dt = softplus(b_dt)
        b_total += b_dt
        b_h = decayed(b_h, b_dt[:, None] * b_A) + (b_dt * b_x)[:, None] * b_B[None, :]
        if STORE_Y:
            b_C = b_next_C.to(tl.float32)
            p_C += s_Ct
            b_next_C = tl.load(p_C, mask=m_tn, other=0.0)
            # Padding has an h of 0, unless dt is not finite.
            b_y = tl.sum(tl.where(m_n[None, :], b_h * b_C[None, :], 0.0), axis=1) + b_skip * b_x
            if HAS_Z:
                b_y *= silu(b_next_z.to(tl.float32))
                p_z += s_zt
                b_next_z = tl.load(p_z, mask=m_td, other=0.0)
            tl.store(p_y, b_y.to(p_y.dtype.element_ty), mask=m_d)
            p_y += D
        t += 1
    if p_final is not None:
        tl.store(p_final + i_s.to(tl.int64) * s_final + o_h, b_h, mask=m_h)
    if p_total is not None:
        tl.store(p_total + i_s.to(tl.int64) * D + o_d, b_total, mask=m_d)


@triton.jit(do_not_specialize=["chunks"])
def carry_kernel(
    p_states,  # [sequences, chunks, D, N] fp32: what each chunk adds becomes what it begins with
    p_total,  # [sequences, chunks, D] fp32
    p_A,  # [D, N] fp32
    p_initial,  # [sequences, D, N] fp32 or None
    p_final,  # [sequences, D, N] fp32
    D,
    N,
    chunks,
    BD: tl.constexpr,
    BN: tl.constexpr,
):
    """One program: BD channels of a sequence, chunk by chunk."""
    blocks = tl.cdiv(D, BD)
    i_n, i_d = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    o_d, o_n = i_d * BD + tl.arange(0, BD), tl.arange(0, BN)
    m_d = o_d < D
    m_h = m_d[:, None] & (o_n < N)[None, :]
    o_h = o_d.to(tl.int64)[:, None] * N + o_n[None, :]  # [BD, BN]
    b_A = tl.load(p_A + o_h, mask=m_h, other=0.0) * 1.4426950408889634
    b_h = tl.zeros([BD, BN], dtype=tl.float32)
    if p_initial is not None:
        b_h += tl.load(p_initial + i_n * D * N + o_h, mask=m_h, other=0.0)
    p_states += i_n * chunks * D * N + o_h
    p_total += i_n * chunks * D + o_d
    i_c = 0
    while i_c < chunks:
        b_added = tl.load(p_states, mask=m_h, other=0.0)
        b_total = tl.load(p_total, mask=m_d, other=0.0)
        tl.store(p_states, b_h, mask=m_h)
        b_h = decayed(b_h, b_total[:, None] * b_A) + b_added
        p_states += tl.cast(D, tl.int64) * N
        p_total += D
        i_c += 1
    tl.store(p_final + i_n * D * N + o_h, b_h, mask=m_h)


def launch(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens) -> tuple[torch.Tensor, torch.Tensor]:
    """Arguments and results as in `reference`, with `cu_seqlens` [S + 1] for its bounds. Nothing waits for the GPU."""
    rows, T, channels = x.shape
    A = A.float().contiguous()
    initial = None if initial_state is None else initial_state.contiguous()
    y = torch.empty(rows, T, channels, dtype=x.dtype, device=x.device)
    if cu_seqlens is not None:
        bounds = cu_seqlens.to(x.device, torch.int64).contiguous()
        final = torch.empty(bounds.shape[0] - 1, *A.shape, dtype=torch.float32, device=x.device)
        _scan(y, x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial, final, None, bounds, 1, T)
        return y, final
    final = torch.empty(rows, *A.shape, dtype=torch.float32, device=x.device)
    chunks = _chunks(rows, T, channels, A.shape[1], x.device)
    if chunks == 1:
        _scan(y, x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial, final, None, None, 1, T)
        return y, final
    length = triton.cdiv(T, chunks)
    chunks = triton.cdiv(T, length)
    states = torch.empty(rows * chunks, *A.shape, dtype=torch.float32, device=x.device)
    total = torch.empty(rows * chunks, channels, dtype=torch.float32, device=x.device)
    _scan(None, x, dt, A, B, C, D, z, dt_bias, dt_softplus, None, states, total, None, chunks, length)
    sizes = tile(A.shape[1])
    with torch.cuda.device_of(x):
        carry_kernel[(rows * triton.cdiv(channels, sizes["BD"]),)](
            states, total, A, initial, final, channels, A.shape[1], chunks, **sizes, num_warps=_num_warps(), **OPTIONS
        )
    _scan(y, x, dt, A, B, C, D, z, dt_bias, dt_softplus, states, None, None, None, chunks, length)
    return y, final


def step(x, dt, A, B, C, state, D, z, dt_bias, dt_softplus) -> torch.Tensor:
    """y; `state` [B, D, N] is updated in place."""
    rows, T, channels = x.shape
    y = torch.empty(rows, T, channels, dtype=x.dtype, device=x.device)
    own = state if state.stride()[1:] == (A.shape[1], 1) else state.contiguous()
    _scan(y, x, dt, A.float().contiguous(), B, C, D, z, dt_bias, dt_softplus, own, own, None, None, 1, T)
    if own is not state:
        state.copy_(own)
    return y


def _chunks(rows: int, T: int, channels: int, N: int, device: torch.device) -> int:
    """Into how many chunks sequences are cut: as few as make enough programs."""
    programs = rows * triton.cdiv(channels, tile(N)["BD"])
    return max(1, min(PROGRAMS * multiprocessors(device) // programs, T // SHORTEST_CHUNK))


def _num_warps() -> int:
    return 1 if torch.version.hip else 2


def _scan(y, x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial, final, total, bounds, chunks, length):
    """scan_kernel on contiguous A, and states whose last two dimensions are contiguous."""
    (rows, T, channels), N = x.shape, A.shape[1]
    sizes = tile(N)
    sequences = rows if bounds is None else bounds.shape[0] - 1
    with torch.cuda.device_of(x):
        scan_kernel[(sequences * chunks * triton.cdiv(channels, sizes["BD"]),)](
            y,
            x,
            dt,
            A,
            B,
            C,
            None if D is None else D.contiguous(),
            z,
            None if dt_bias is None else dt_bias.contiguous(),
            initial,
            final,
            total,
            bounds,
            T,
            channels,
            N,
            chunks,
            length,
            0 if initial is None else initial.stride(0),
            0 if final is None else final.stride(0),
            *x.stride(),
            *dt.stride(),
            *B.stride(),
            *C.stride(),
            *((0, 0, 0) if z is None else z.stride()),
            **sizes,
            SOFTPLUS=dt_softplus,
            num_warps=_num_warps(),
            **OPTIONS,
        )
