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
