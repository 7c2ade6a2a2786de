"""Triton: a linear layer of experts for up to 8 tokens, limited by reading each picked expert once.

Every (token, pick) pair has its programs; those of the first pair of an expert compute for all pairs of that expert,
and the others end at once. So the experts are sorted on the device, without a launch or a synchronisation of their own.
"""

import torch
import triton
import triton.language as tl

from ..triton_common import (
    NUM_WARPS,
    OPTIONS,
    REDUCE_TILE,
    column_tile,
    dot_rows,
    multiprocessors,
    row_tile,
    sum_columns,
    sum_parts,
)


@triton.jit
def same_expert(p_ids, i_p, pairs, B: tl.constexpr, PAIRS: tl.constexpr):
    """Up to B pairs from i_p on that picked its expert.

    Returns the expert, whether i_p speaks for these pairs, how many they are, and the pairs [B].
    """
    o_p = tl.arange(0, PAIRS)
    expert = tl.load(p_ids + i_p)
    m_same = (tl.load(p_ids + o_p, mask=o_p < pairs, other=0) == expert) & (o_p < pairs)  # [PAIRS]
    b_rank = tl.cumsum(m_same.to(tl.int32), axis=0) - 1
    own = tl.sum((m_same & (o_p < i_p)).to(tl.int32), axis=0)
    m_slot = m_same[None, :] & (b_rank[None, :] == own + tl.arange(0, B)[:, None])  # [B, PAIRS]
    b_pair = tl.sum(tl.where(m_slot, o_p[None, :], 0), axis=1)
    count = tl.sum(tl.sum(m_slot.to(tl.int32), axis=1), axis=0)
    return expert, own % B == 0, count, b_pair


@triton.jit
def rows_of_pairs(p_x, b_pair, sharing, K, B: tl.constexpr):
    """Pointers [B, 1, 1] that lead to the row of pair b where b * K, what follows x in memory, is added to them."""
    return p_x + (b_pair // sharing - tl.arange(0, B)).to(tl.int64)[:, None, None] * K


@triton.jit(do_not_specialize=["pairs", "sharing", "E"])
def expert_rows_kernel(
    p_y,  # [pairs, N]
    p_x,  # [pairs / sharing, K]
    p_w,  # [E, N, K]
    p_bias,  # [E, N] or None
    p_ids,  # [pairs] int64
    pairs,
    sharing,  # pairs that have one row of x
    E,
    N,
    K,
    B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VEC: tl.constexpr,
    PAIRS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """One program: BLOCK_N outputs of every pair of one expert."""
    i_n, i_p = tl.program_id(0), tl.program_id(1)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    expert, is_first, count, b_pair = same_expert(p_ids, i_p, pairs, B, PAIRS)
    if (expert < 0) | (expert >= E):
        b_zero = tl.zeros([BLOCK_N], dtype=p_y.dtype.element_ty)
        tl.store(p_y + i_p.to(tl.int64) * N + o_n, b_zero, mask=m_n)
    elif is_first:
        p_own = p_w + expert.to(tl.int64) * N * K
        p_rows = rows_of_pairs(p_x, b_pair, sharing, K, B)
        b_y = dot_rows(p_own, p_rows, o_n, m_n, count, K, B, BLOCK_N, BLOCK_K, VEC)  # [B, BLOCK_N]
        if HAS_BIAS:
            b_y += tl.load(p_bias + expert.to(tl.int64) * N + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        m_b = tl.arange(0, B) < count
        tl.store(p_y + b_pair.to(tl.int64)[:, None] * N + o_n[None, :], b_y, mask=m_b[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=["pairs", "sharing", "E", "splits"])
def expert_columns_kernel(
    p_part,  # [splits, pairs, N] fp32
    p_x,  # [pairs / sharing, K]
    p_w,  # [E, K, N]: the experts' transposes, as they are stored
    p_cutoff,  # [E, K] fp32 or None
    p_ids,  # [pairs] int64
    pairs,
    sharing,  # pairs that have one row of x
    E,
    N,
    K,
    splits,
    B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SHARES: tl.constexpr,
    PAIRS: tl.constexpr,
    HAS_CUTOFF: tl.constexpr,
):
    """One program: BLOCK_N outputs of every pair of one expert, over every splits-th block of K."""
    i_n, i_s, i_p = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    expert, is_first, count, b_pair = same_expert(p_ids, i_p, pairs, B, PAIRS)
    if is_first & (expert >= 0) & (expert < E):
        p_own = p_w + expert.to(tl.int64) * N * K
        p_limit = p_cutoff + expert.to(tl.int64) * K if HAS_CUTOFF else p_cutoff
        p_rows = rows_of_pairs(p_x, b_pair, sharing, K, B)
        b_y = sum_columns(
            p_own, p_rows, p_limit, o_n, i_s, count, N, K, splits, B, BLOCK_N, BLOCK_K, SHARES, HAS_CUTOFF
        )  # [B, BLOCK_N]
        m_b = tl.arange(0, B) < count
        o_part = (i_s * pairs + b_pair).to(tl.int64)[:, None] * N + o_n[None, :]  # [B, BLOCK_N]
        tl.store(p_part + o_part, b_y, mask=m_b[:, None] & (o_n < N)[None, :])


@triton.jit(do_not_specialize=["pairs", "E", "splits"])
def expert_reduce_kernel(
    p_y,  # [pairs, N]
    p_part,  # [splits, pairs, N] fp32
    p_bias,  # [E, N] or None
    p_ids,  # [pairs] int64
    pairs,
    E,
    N,
    splits,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """One program: BLOCK_N outputs of one pair, the partial sums added in a fixed order;
    zeros for an id of no expert."""
    i_n, i_p = tl.program_id(0), tl.program_id(1)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    expert = tl.load(p_ids + i_p)
    m_own = tl.where((expert >= 0) & (expert < E), m_n, False)
    b_y = sum_parts(p_part, o_n, m_own, i_p, pairs, N, splits, BLOCK_S)  # [BLOCK_N]
    if HAS_BIAS:
        b_y += tl.load(p_bias + expert.to(tl.int64) * N + o_n, mask=m_own, other=0.0).to(tl.float32)
    tl.store(p_y + i_p.to(tl.int64) * N + o_n, b_y, mask=m_n)


def row_config(T: int, P: int, E: int, N: int, dtype: torch.dtype, multiprocessors: int) -> dict[str, int]:
    """Constexprs of expert_rows_kernel; at most as many experts are read as there are pairs."""
    tile = row_tile(T, min(E, T * P) * N, dtype, multiprocessors)
    return tile | {"PAIRS": most_pairs(tile["B"], T * P)}


def column_config(T: int, P: int, E: int, N: int, K: int, dtype: torch.dtype, multiprocessors: int) -> dict[str, int]:
    """Constexprs of expert_columns_kernel, and the splits of K."""
    tile = column_tile(T, N, K, dtype, multiprocessors, weights=min(E, T * P))
    return tile | {"PAIRS": most_pairs(tile["B"], T * P)}


def most_pairs(B: int, pairs: int) -> int:
    """Pairs that a kernel is compiled for: one number for every P up to 16."""
    return triton.next_power_of_2(max(16 * B, pairs))


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    bias: torch.Tensor | None,
    cutoff: torch.Tensor | None,
    column_major: bool,
) -> torch.Tensor:
    """x [T, K] or [T, P, K], weight [E, N, K], ids [T, P], bias [E, N] or None, cutoff [E, K] fp32 or None -> [T, P, N]

    All contiguous but a column-major weight, of which weight.mT is; a cutoff needs that. 1 <= T <= 8.
    """
    (T, P), (E, N, K) = ids.shape, weight.shape
    pairs, sharing = T * P, P if x.dim() == 2 else 1
    options = {"num_warps": NUM_WARPS, **OPTIONS}
    y = torch.empty(T, P, N, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        if not column_major:
            tile = row_config(T, P, E, N, x.dtype, multiprocessors(x.device))
            expert_rows_kernel[(triton.cdiv(N, tile["BLOCK_N"]), pairs)](
                y, x, weight, bias, ids, pairs, sharing, E, N, K, **tile, HAS_BIAS=bias is not None, **options
            )
            return y
        tile = column_config(T, P, E, N, K, x.dtype, multiprocessors(x.device))
        splits = tile["splits"]
        part = torch.empty(splits, pairs, N, dtype=torch.float32, device=x.device)
        expert_columns_kernel[(triton.cdiv(N, tile["BLOCK_N"]), splits, pairs)](
            part, x, weight, cutoff, ids, pairs, sharing, E, N, K, **tile, HAS_CUTOFF=cutoff is not None, **options
        )
        expert_reduce_kernel[(triton.cdiv(N, REDUCE_TILE["BLOCK_N"]), pairs)](
            y, part, bias, ids, pairs, E, N, splits, **REDUCE_TILE, HAS_BIAS=bias is not None, **options
        )
    return y
