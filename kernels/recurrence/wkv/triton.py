"""Triton: RWKV-4's recurrence, a program for some channels of a row, one token after the other."""

import torch
import triton
import triton.language as tl

from ...triton_common import OPTIONS

BD = 32
NUM_WARPS = 1


@triton.jit
def add(b_numerator, b_denominator, b_maximum, b_k, b_v):
    """The sums over exp(maximum) with a value whose weight is exp(k)."""
    b_highest = tl.where(b_maximum > b_k, b_maximum, b_k)
    b_past, b_present = tl.exp(b_maximum - b_highest), tl.exp(b_k - b_highest)
    return b_past * b_numerator + b_present * b_v, b_past * b_denominator + b_present, b_highest


@triton.jit(do_not_specialize=["T"])
def wkv_kernel(
    p_y,  # [B, T, D]
    p_key,  # [B, T, D]
    p_value,  # [B, T, D]
    p_decay,  # [D]
    p_first,  # [D]
    p_numerator,  # [B, D] fp32 or None
    p_denominator,  # [B, D] fp32 or None
    p_maximum,  # [B, D] fp32 or None
    p_last_numerator,  # [B, D] fp32
    p_last_denominator,  # [B, D] fp32
    p_last_maximum,  # [B, D] fp32
    T,
    D,
    s_kb,
    s_kt,
    s_kd,
    s_vb,
    s_vt,
    s_vd,
    BD: tl.constexpr,
):
    blocks = tl.cdiv(D, BD)
    i_b, i_d = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    o_d = i_d * BD + tl.arange(0, BD)
    m_d = o_d < D
    o_s = i_b * D + o_d
    b_decay = -tl.exp(tl.load(p_decay + o_d, mask=m_d, other=0.0).to(tl.float32))
    b_first = tl.load(p_first + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_numerator, b_denominator = tl.zeros([BD], dtype=tl.float32), tl.zeros([BD], dtype=tl.float32)
    b_maximum = tl.zeros([BD], dtype=tl.float32) - 1e38
    if p_maximum is not None:
        b_numerator = tl.load(p_numerator + o_s, mask=m_d, other=0.0)
        b_denominator = tl.load(p_denominator + o_s, mask=m_d, other=0.0)
        b_maximum = tl.load(p_maximum + o_s, mask=m_d, other=0.0)
    p_key += i_b * s_kb + o_d.to(tl.int64) * s_kd
    p_value += i_b * s_vb + o_d.to(tl.int64) * s_vd
    p_y += i_b * T * D + o_d
    b_next_k = tl.load(p_key, mask=m_d, other=0.0)
    b_next_v = tl.load(p_value, mask=m_d, other=0.0)
    t = 0
    while t < T:
        b_k, b_v = b_next_k.to(tl.float32), b_next_v.to(tl.float32)
        p_key += s_kt
        p_value += s_vt
        t += 1
        m_next = o_d < tl.where(t < T, D, 0)  # the next token is on its way while this one is computed
        b_next_k = tl.load(p_key, mask=m_next, other=0.0)
        b_next_v = tl.load(p_value, mask=m_next, other=0.0)
        b_above, b_below, _ = add(b_numerator, b_denominator, b_maximum, b_k + b_first, b_v)
        tl.store(p_y, (b_above / b_below).to(p_y.dtype.element_ty), mask=m_d)
        p_y += D
        b_numerator, b_denominator, b_maximum = add(b_numerator, b_denominator, b_maximum + b_decay, b_k, b_v)
    tl.store(p_last_numerator + o_s, b_numerator, mask=m_d)
    tl.store(p_last_denominator + o_s, b_denominator, mask=m_d)
    tl.store(p_last_maximum + o_s, b_maximum, mask=m_d)


def launch(time_decay, time_first, key, value, state) -> tuple[torch.Tensor, ...]:
    """Arguments and results as in `cpu.launch`; key and value of any strides."""
    B, T, D = key.shape
    y = torch.empty(B, T, D, dtype=key.dtype, device=key.device)
    after = [torch.empty(B, D, dtype=torch.float32, device=key.device) for _ in range(3)]
    before = (None, None, None) if state is None else [x.contiguous() for x in state]
    with torch.cuda.device_of(key):
        wkv_kernel[(B * triton.cdiv(D, BD),)](
            y,
            key,
            value,
            time_decay.contiguous(),
            time_first.contiguous(),
            *before,
            *after,
            T,
            D,
            *key.stride(),
            *value.stride(),
            BD=BD,
            num_warps=NUM_WARPS,
            **OPTIONS,
        )
    return y, *after
