"""Triton: the product of 1 to 8 rows of x with a column-major weight, of which only the active columns are read.

Predicated loads, not a compacted index list: the list costs a third kernel and saves no traffic, since one warp's load
lies inside one column's storage (512 bytes along N, four whole 128-byte lines) and moves nothing when that column is
inactive. Estimate at half activity for K = 4096, N = 14336 in bf16 and 4 TB/s: 59 MB of weights, 15 us; the partial
sums add about 1 MB out and in, mostly within L2, and the launch of the reducing kernel.
"""

import torch
import triton
import triton.language as tl

from ..triton_common import NUM_WARPS, OPTIONS, THREADS, multiprocessors, vector_length

REDUCE_TILE = {"BLOCK_S": 64, "BLOCK_N": 32}  # one load covers every split
COLUMNS = {1: 32, 2: 32, 4: 16, 8: 8}  # per step, by B: what the registers hold
RESIDENT = {1: 7, 2: 5, 4: 4, 8: 4}  # programs that a multiprocessor's registers hold, by B


@triton.jit
def load_columns(p_x, p_cutoff, i_k, rows, K, B: tl.constexpr, BLOCK_K: tl.constexpr, HAS_CUTOFF: tl.constexpr):
    """x in fp32 with 0 for inactive columns, [B, BLOCK_K, 1], and which columns are active, [1, BLOCK_K, 1]."""
    o_b = tl.arange(0, B)[:, None, None]
    o_k = i_k + tl.arange(0, BLOCK_K)[None, :, None]
    m_k = o_k < K
    p_x += o_b.to(tl.int64) * K + o_k
    b_x = tl.load(p_x, mask=(o_b < rows) & m_k, other=0.0, eviction_policy="evict_last").to(tl.float32)
    if HAS_CUTOFF:
        b_cutoff = tl.load(p_cutoff + o_k, mask=m_k, other=0.0, eviction_policy="evict_last")
        # Rows of padding hold 0: active only under a cutoff (negative, NaN) for which every other row is active, too.
        m_k = tl.max(1 - (tl.abs(b_x) <= b_cutoff).to(tl.int32), axis=0, keep_dims=True) > 0
    return tl.where(m_k, b_x, 0.0), m_k


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
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    o_k = tl.arange(0, BLOCK_K)
    p_w += o_k.to(tl.int64)[None, :, None] * N + o_n[None, None, :]  # [1, BLOCK_K, BLOCK_N]
    m_n = (o_n < N)[None, None, :]
    i_k = i_s * BLOCK_K
    o_w = i_s.to(tl.int64) * BLOCK_K * N
    # A thread sees every SHARES-th k of a block and sums over those alone; across threads only once, after the loop.
    b_acc = tl.zeros([B, SHARES, BLOCK_N], dtype=tl.float32)
    b_x, m_k = load_columns(p_x, p_cutoff, i_k, rows, K, B, BLOCK_K, HAS_CUTOFF)
    while i_k < K:
        b_w = tl.load(p_w + o_w, mask=m_k & m_n, other=0.0, eviction_policy="evict_first")
        i_k += splits * BLOCK_K
        o_w += splits.to(tl.int64) * BLOCK_K * N
        # The next x is on its way, too, before b_w has arrived.
        b_next, m_k = load_columns(p_x, p_cutoff, i_k, rows, K, B, BLOCK_K, HAS_CUTOFF)
        b_wx = b_w.to(tl.float32) * b_x  # [B, BLOCK_K, BLOCK_N]
        b_acc += tl.sum(tl.reshape(b_wx, [B, BLOCK_K // SHARES, SHARES, BLOCK_N]), axis=1)
        b_x = b_next
    b_y = tl.sum(b_acc, axis=1)  # [B, BLOCK_N]
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
    o_s = tl.arange(0, BLOCK_S)[:, None]
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    p_part += (o_s * rows + i_b).to(tl.int64) * N + o_n[None, :]  # [BLOCK_S, BLOCK_N]
    b_y = tl.sum(tl.load(p_part, mask=(o_s < splits) & m_n[None, :], other=0.0), axis=0)
    if HAS_BIAS:
        b_y += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)
    tl.store(p_y + i_b.to(tl.int64) * N + o_n, b_y, mask=m_n)


def config(B: int, N: int, K: int, dtype: torch.dtype, multiprocessors: int) -> dict[str, int]:
    """Constexprs of partial_kernel, and how many programs divide K: all resident at once, so that they end together."""
    B, VEC = triton.next_power_of_2(B), vector_length(dtype)
    BLOCK_N, BLOCK_K = 32 * VEC, COLUMNS[B]  # a warp along N
    splits = RESIDENT[B] * multiprocessors // triton.cdiv(N, BLOCK_N)
    return {
        "B": B,
        "BLOCK_N": BLOCK_N,
        "BLOCK_K": BLOCK_K,
        "SHARES": THREADS * VEC // BLOCK_N,
        "splits": max(1, min(splits, triton.cdiv(K, BLOCK_K), REDUCE_TILE["BLOCK_S"])),
    }


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
