"""What the Triton kernels for 1 to 8 rows of x share: the product with rows of a weight, and how they are launched."""

from functools import cache

import torch
import triton
import triton.language as tl

# Said at every launch: Triton 3.9 warns where it is left open, and its default changes in 3.10.
OPTIONS = {"enable_fp_fusion": True}
THREADS = 128  # of a program; the tiles below give each of them 16-byte loads
NUM_WARPS = THREADS // (64 if torch.version.hip else 32)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors `device` has; 132 (an H200) for the interpreter on CPU tensors."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def vector_length(dtype: torch.dtype) -> int:
    """Elements in the 16 bytes that one thread loads at once."""
    return 16 // dtype.itemsize


def row_tile(B: int, N: int, dtype: torch.dtype, multiprocessors: int) -> dict[str, int]:
    """Constexprs of `dot_rows` for B rows of x and N rows of weight; the grid is ceil(N / BLOCK_N).

    Four 16-byte loads per thread: 8 KB a program in flight, several programs a multiprocessor. Few rows of x and small
    N: wide rather than tall, so that every multiprocessor has work without a second, reducing kernel. More rows of x:
    tall, since every program reads all of x again (from L1 or L2).
    """
    B, VEC = triton.next_power_of_2(B), vector_length(dtype)
    BLOCK_N = 4 if triton.cdiv(N, 4) >= 4 * multiprocessors else min(B, 4)
    return {"B": B, "BLOCK_N": BLOCK_N, "BLOCK_K": 4 // BLOCK_N * THREADS * VEC, "VEC": VEC}


REDUCE_TILE = {"BLOCK_S": 64, "BLOCK_N": 32}  # of what adds up the parts; one load covers every split
COLUMNS = {1: 32, 2: 32, 4: 16, 8: 8}  # per step, by B: what the registers hold
RESIDENT = {1: 7, 2: 5, 4: 4, 8: 4}  # programs that a multiprocessor's registers hold, by B


def column_tile(B: int, N: int, K: int, dtype: torch.dtype, multiprocessors: int, weights: int = 1) -> dict[str, int]:
    """Constexprs of `sum_columns` for B rows of x, and how many programs divide K (splits).

    All programs of this many weights are resident at once, so that they end together.
    """
    B, VEC = triton.next_power_of_2(B), vector_length(dtype)
    BLOCK_N, BLOCK_K = 32 * VEC, COLUMNS[B]  # a warp along N
    splits = RESIDENT[B] * multiprocessors // (weights * triton.cdiv(N, BLOCK_N))
    return {
        "B": B,
        "BLOCK_N": BLOCK_N,
        "BLOCK_K": BLOCK_K,
        "SHARES": THREADS * VEC // BLOCK_N,
        "splits": max(1, min(splits, triton.cdiv(K, BLOCK_K), REDUCE_TILE["BLOCK_S"])),
    }


@triton.jit
def dot_rows(
    p_w,  # [N, K]
    p_x,  # [rows, K]
    o_n,  # [BLOCK_N]
    m_n,  # [BLOCK_N]
    rows,
    K,
    B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VEC: tl.constexpr,
):
    """x . w[o_n] in fp32, [B, BLOCK_N]. Rows of w outside m_n are not read."""
    # Three axes from the start, so that w and x load in one layout: all warps along K, VEC neighbours per thread. The
    # sum over those VEC stays in the thread; what is left of K is reduced across threads only once, after the loop.
    o_b = tl.arange(0, B)[:, None, None]  # [B, 1, 1]
    o_k = tl.arange(0, BLOCK_K)[None, None, :]  # [1, 1, BLOCK_K]
    p_w += o_n.to(tl.int64)[None, :, None] * K + o_k  # [1, BLOCK_N, BLOCK_K]
    p_x += o_b.to(tl.int64) * K + o_k  # [B, 1, BLOCK_K]
    m_b = o_b < rows
    m_w = m_n[None, :, None]
    b_acc = tl.zeros([B, BLOCK_N, BLOCK_K // VEC], dtype=tl.float32)
    i_k = 0  # a range to a runtime K fails in the interpreter of Triton 3.6 with NumPy 2.4
    while i_k < K:
        m_k = i_k + o_k < K
        b_w = tl.load(p_w + i_k, mask=m_w & m_k, other=0.0, eviction_policy="evict_first").to(tl.float32)
        b_x = tl.load(p_x + i_k, mask=m_b & m_k, other=0.0, eviction_policy="evict_last").to(tl.float32)
        b_acc += tl.sum(tl.reshape(b_w * b_x, [B, BLOCK_N, BLOCK_K // VEC, VEC]), axis=3)
        i_k += BLOCK_K
    return tl.sum(b_acc, axis=2)


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


@triton.jit
def sum_columns(
    p_w,  # [K, N]: the transpose of a column-major weight, as it is stored
    p_x,  # [rows, K]
    p_cutoff,  # [K] fp32 or None
    o_n,  # [BLOCK_N]
    i_s,
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
    """x . w[:, o_n] in fp32, [B, BLOCK_N], over every splits-th block of K from i_s on:
    active columns come in clusters."""
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
    return tl.sum(b_acc, axis=1)


@triton.jit
def sum_parts(p_part, o_n, m_n, i_b, rows, N, splits, BLOCK_S: tl.constexpr):
    """Row i_b of the partial sums [splits, rows, N] added up at o_n, in a fixed order."""
    o_s = tl.arange(0, BLOCK_S)[:, None]
    p_part += (o_s * rows + i_b).to(tl.int64) * N + o_n[None, :]  # [BLOCK_S, BLOCK_N]
    return tl.sum(tl.load(p_part, mask=(o_s < splits) & m_n[None, :], other=0.0), axis=0)


@triton.jit
def silu(b_x):
    b_e = tl.exp(-tl.abs(b_x))  # at most 1
    return b_x * tl.where(b_x < 0, b_e, 1.0) / (1.0 + b_e)
