"""Triton: the product of 1 to 8 rows of x with a row-major weight, limited by reading the weight once."""

import torch
import triton
import triton.language as tl

from ..triton_common import NUM_WARPS, OPTIONS, dot_rows, multiprocessors, row_tile


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    p_y,  # [rows, N]
    p_x,  # [rows, K]
    p_w,  # [N, K]
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
    """One program: BLOCK_N outputs of every row of x."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    b_y = dot_rows(p_w, p_x, o_n, m_n, rows, K, B, BLOCK_N, BLOCK_K, VEC)  # [B, BLOCK_N]
    if HAS_BIAS:
        b_y += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    o_b = tl.arange(0, B)[:, None]
    tl.store(p_y + o_b.to(tl.int64) * N + o_n[None, :], b_y, mask=(o_b < rows) & m_n[None, :])


def config(B: int, N: int, K: int, dtype: torch.dtype, multiprocessors: int) -> dict[str, int]:
    """Constexprs for these sizes. K is not split: N in the hundreds already gives every multiprocessor work."""
    return row_tile(B, N, dtype, multiprocessors)


def launch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [B, K], weight [N, K], bias [N] or None, all contiguous, 1 <= B <= 8 -> [B, N] in x's dtype."""
    (B, K), N = x.shape, weight.shape[0]
    y = torch.empty(B, N, dtype=x.dtype, device=x.device)
    tile = config(B, N, K, x.dtype, multiprocessors(x.device))
    with torch.cuda.device_of(x):
        linear_kernel[(triton.cdiv(N, tile["BLOCK_N"]),)](
            y, x, weight, bias, B, N, K, **tile, HAS_BIAS=bias is not None, num_warps=NUM_WARPS, **OPTIONS
        )
    return y
