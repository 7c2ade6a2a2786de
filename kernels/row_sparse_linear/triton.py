"""Triton: a gated product of 1 to 8 rows of x with a row-major weight; only rows with an active gate are read."""

import torch
import triton
import triton.language as tl

from ..triton_common import NUM_WARPS, OPTIONS, dot_rows, multiprocessors, row_tile


@triton.jit(do_not_specialize=["rows"])
def row_sparse_linear_kernel(
    p_y,  # [rows, N]
    p_x,  # [rows, K]
    p_w,  # [N, K]
    p_gate,  # [rows, N]
    p_threshold,  # [] fp32
    p_bias,  # [N] or None
    rows,
    N,
    K,
    B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VEC: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """One program: BLOCK_N outputs of every row of x; it ends at once when none of them is active."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_b = tl.arange(0, B)[:, None]
    o_y = o_b.to(tl.int64) * N + o_n[None, :]  # [B, BLOCK_N]
    m_y = (o_b < rows) & (o_n < N)[None, :]
    p_gate += o_y
    b_gate = tl.load(p_gate, mask=m_y, other=0.0).to(tl.float32)
    m_active = m_y & ((tl.abs(b_gate) <= tl.load(p_threshold)) == 0)  # not (<=): NaN is active
    m_n = tl.max(m_active.to(tl.int32), axis=0) > 0  # [BLOCK_N]: for some row of x
    if tl.max(m_n.to(tl.int32), axis=0) == 0:
        tl.store(p_y + o_y, tl.zeros([B, BLOCK_N], dtype=tl.float32), mask=m_y)
        return
    b_y = dot_rows(p_w, p_x, o_n, m_n, rows, K, B, BLOCK_N, BLOCK_K, VEC)
    if HAS_BIAS:
        b_y += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    b_gate = tl.load(p_gate, mask=m_y, other=0.0).to(tl.float32)  # again: kept through the loop it would cost registers
    tl.store(p_y + o_y, tl.where(m_n[None, :], b_gate * b_y, 0.0), mask=m_y)


def config(B: int, N: int, K: int, dtype: torch.dtype, multiprocessors: int) -> dict[str, int]:
    """Constexprs for these sizes: as for the dense product; its programs are short, so early ends leave no gap."""
    return row_tile(B, N, dtype, multiprocessors)


def launch(
    x: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor, threshold: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x [B, K], weight [N, K], gate [B, N], threshold [] fp32, bias [N] or None, contiguous, 1 <= B <= 8 -> [B, N]."""
    (B, K), N = x.shape, weight.shape[0]
    y = torch.empty(B, N, dtype=x.dtype, device=x.device)
    tile = config(B, N, K, x.dtype, multiprocessors(x.device))
    with torch.cuda.device_of(x):
        row_sparse_linear_kernel[(triton.cdiv(N, tile["BLOCK_N"]),)](
            y,
            x,
            weight,
            gate,
            threshold,
            bias,
            B,
            N,
            K,
            **tile,
            HAS_BIAS=bias is not None,
            num_warps=NUM_WARPS,
            **OPTIONS,
        )
    return y
