"""Triton: the product of 1 to 8 rows of x with a column-major weight, of which only the active columns are read.

Predicated loads, not a compacted index list: the list costs a third kernel and saves no traffic, since one warp's load
lies inside one column's storage (512 bytes along N, four whole 128-byte lines) and moves nothing when that column is
inactive. Estimate at half activity for K = 4096, N = 14336 in bf16 and 4 TB/s: 59 MB of weights, 15 us; the partial
sums add about 1 MB out and in, mostly within L2, and the launch of the reducing kernel.
"""

import torch
import triton
import triton.language as tl

from ..triton_common import NUM_WARPS, OPTIONS, REDUCE_TILE, column_tile, multiprocessors, sum_columns, sum_parts


@triton.jit(do_not_specialize=["rows", "splits"])
def partial_kernel(
    p_part,  # [splits, rows, N] fp32
    p_x,  # [rows, K]
    p_w,  # [K, N]: the weight's transpose, as it is stored
    p_cutoff,  # [K] fp32 or None
    rows,
    N,
    K,
    splits,
    B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SHARES: tl.constexpr,
    HAS_CUTOFF: tl.constexpr,
):
    """One program: BLOCK_N outputs over every splits-th block of K (spread out: active columns come in clusters)."""
    i_n, i_s = tl.program_id(0), tl.program_id(1)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_y = sum_columns(
        p_w, p_x, p_cutoff, o_n, i_s, rows, N, K, splits, B, BLOCK_N, BLOCK_K, SHARES, HAS_CUTOFF
    )  # [B, BLOCK_N]
    o_b = tl.arange(0, B)[:, None]
    p_part += (i_s * rows + o_b).to(tl.int64) * N + o_n[None, :]
    tl.store(p_part, b_y, mask=(o_b < rows) & (o_n < N)[None, :])


@triton.jit(do_not_specialize=["rows", "splits"])
def reduce_kernel(
    p_y,  # [rows, N]
    p_part,  # [splits, rows, N] fp32
    p_bias,  # [N] or None
    rows,
    N,
    splits,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """One program: BLOCK_N outputs of one row, the partial sums added in a fixed order."""
    i_n, i_b = tl.program_id(0), tl.program_id(1)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    b_y = sum_parts(p_part, o_n, m_n, i_b, rows, N, splits, BLOCK_S)  # [BLOCK_N]
    if HAS_BIAS:
        b_y += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)
    tl.store(p_y + i_b.to(tl.int64) * N + o_n, b_y, mask=m_n)


def config(B: int, N: int, K: int, dtype: torch.dtype, multiprocessors: int) -> dict[str, int]:
    """Constexprs of partial_kernel, and how many programs divide K: all resident at once, so that they end together."""
    return column_tile(B, N, K, dtype, multiprocessors)


def launch(
    x: torch.Tensor, weight: torch.Tensor, cutoff: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """x [B, K], weight [N, K] with contiguous weight.t(), cutoff [K] fp32 or None, bias [N] or None -> [B, N]."""
    (B, K), N = x.shape, weight.shape[0]
    tile = config(B, N, K, x.dtype, multiprocessors(x.device))
    splits = tile["splits"]
    part = torch.empty(splits, B, N, dtype=torch.float32, device=x.device)
    y = torch.empty(B, N, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        partial_kernel[(triton.cdiv(N, tile["BLOCK_N"]), splits)](
            part, x, weight, cutoff, B, N, K, **tile, HAS_CUTOFF=cutoff is not None, num_warps=NUM_WARPS, **OPTIONS
        )
        reduce_kernel[(triton.cdiv(N, REDUCE_TILE["BLOCK_N"]), B)](
            y, part, bias, B, N, splits, **REDUCE_TILE, HAS_BIAS=bias is not None, num_warps=NUM_WARPS, **OPTIONS
        )
    return y
