"""Triton: the attention that tokens receive from few queries, and rows of several tensors gathered in one launch.

Scores take two launches without atomics. The first divides the keys: a program writes logits of its block of keys and,
for each row of logits (one head of one query), the block's largest logit and the sum of exponentials below it. The
second divides the keys anew: a program goes through all rows, whose sums it adds up over the blocks, in order.
"""

import torch
import triton
import triton.language as tl

from ..triton_common import NUM_WARPS, OPTIONS, THREADS

VECTOR_ROWS = 2  # so many rows on a head of keys are multiplied without tensor cores
MOST_ROWS = 16  # of logits in one program of the first launch: what tensor cores take at least, and registers hold
MEAN_TILE = {"BR": 16, "BT": 64, "BS": 64}
GATHERED = 4  # tensors of one launch
WORDS = {4: torch.int32, 2: torch.int16, 1: torch.int8}


@triton.jit
def tanh(x):
    """Relative error below 1e-6 in fp32; below 0.625 by Cephes' polynomial."""
    size = tl.abs(x)
    size = tl.where(size > 10.0, 10.0, size)  # where it is 1; a NaN stays
    square, e = size * size, tl.exp(-2.0 * size)
    p = -5.70498872745e-3 * square + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = p * square - 3.33332819422e-1
    y = tl.where(size < 0.625, p * square * size + size, (1.0 - e) / (1.0 + e))
    return tl.where(x < 0.0, -y, y)


@triton.jit(do_not_specialize=["Q", "T", "s_mb", "s_mq"])
def logits_kernel(
    p_logits,  # [B, H, Q, T] fp32
    p_most,  # [B, H, Q, blocks] fp32: the largest logit of a block, -inf where none is allowed
    p_sum,  # [B, H, Q, blocks] fp32: of exp(logit - largest)
    p_q,  # [B, Q, H, D]
    p_k,  # [B, G, T, D]
    p_mask,  # [B, 1 or Q, T] uint8 or None
    scale,
    softcap,
    Q,
    H,
    G,
    T,
    D,
    s_kb,
    s_kg,
    s_kt,
    s_mb,
    s_mq,
    BR: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    USE_DOT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """One program: BR rows of logits on one head of keys, BT keys."""
    i_t, i_r, i_g = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_b, share = i_g // G, H // G
    o_r = i_r * BR + tl.arange(0, BR)  # row = head * Q + query
    o_q, o_h = o_r % Q, i_g % G * share + o_r // Q  # [BR]
    m_r = o_r < share * Q
    o_t, o_d = i_t * BT + tl.arange(0, BT), tl.arange(0, BD)
    m_t, m_d = o_t < T, o_d < D
    p_k += i_b * s_kb + i_g % G * s_kg + o_t.to(tl.int64)[:, None] * s_kt + o_d[None, :]  # [BT, BD]
    p_q += ((i_b * Q + o_q) * H + o_h)[:, None] * D + o_d[None, :]  # [BR, BD]
    b_k = tl.load(p_k, mask=m_t[:, None] & m_d[None, :], other=0.0)
    b_q = tl.load(p_q, mask=m_r[:, None] & m_d[None, :], other=0.0)
    if USE_DOT:
        b_l = tl.trans(tl.dot(b_k, tl.trans(b_q), input_precision="ieee"))  # [BR, BT]
    else:
        b_l = tl.sum(b_q.to(tl.float32)[:, None, :] * b_k.to(tl.float32)[None, :, :], axis=2)
    b_l *= scale
    if HAS_SOFTCAP:
        b_l = softcap * tanh(b_l / softcap)
    m_l = m_r[:, None] & m_t[None, :]
    m_allowed = m_l
    if HAS_MASK:
        p_m = p_mask + i_b * s_mb + o_q.to(tl.int64)[:, None] * s_mq + o_t[None, :]
        m_allowed = tl.load(p_m, mask=m_l, other=0) != 0
    b_l = tl.where(m_allowed, b_l, float("-inf"))
    b_most = tl.max(b_l, axis=1)  # [BR]
    b_sum = tl.sum(tl.exp(b_l - tl.where(b_most == float("-inf"), 0.0, b_most)[:, None]), axis=1)
    o_row = (i_b * H + o_h) * Q + o_q
    tl.store(p_logits + o_row[:, None] * T + o_t[None, :], b_l, mask=m_l)
    o_block = o_row * tl.num_programs(0) + i_t
    tl.store(p_most + o_block, b_most, mask=m_r)
    tl.store(p_sum + o_block, b_sum, mask=m_r)


@triton.jit(do_not_specialize=["rows", "T", "blocks"])
def mean_kernel(
    p_scores,  # [B, T] fp32
    p_logits,  # [B, rows, T] fp32
    p_most,  # [B, rows, blocks] fp32
    p_sum,  # [B, rows, blocks] fp32
    rows,
    T,
    blocks,
    BR: tl.constexpr,
    BT: tl.constexpr,
    BS: tl.constexpr,
):
    """One program: the scores of BT keys, from all rows."""
    i_t, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_t, o_s = i_t * BT + tl.arange(0, BT), tl.arange(0, BS)
    m_t = o_t < T
    b_scores = tl.zeros([BT], dtype=tl.float32)
    counted = tl.zeros([BR], dtype=tl.float32)  # rows with an allowed key
    i_r = 0  # a range to a runtime length fails in the interpreter of Triton 3.6 with NumPy 2.4
    while i_r < rows:
        o_r = i_r + tl.arange(0, BR)
        m_r, o_row = o_r < rows, i_b * rows + o_r
        b_most = tl.full([BR], float("-inf"), dtype=tl.float32)
        b_sum = tl.zeros([BR], dtype=tl.float32)
        i_s = 0
        while i_s < blocks:
            o_block = o_row[:, None] * blocks + i_s + o_s[None, :]  # [BR, BS]
            m_s = m_r[:, None] & (i_s + o_s < blocks)[None, :]
            b_more = tl.load(p_most + o_block, mask=m_s, other=float("-inf"))
            b_next = tl.maximum(b_most, tl.max(b_more, axis=1))
            b_base = tl.where(b_next == float("-inf"), 0.0, b_next)  # [BR]
            b_parts = tl.load(p_sum + o_block, mask=m_s, other=0.0) * tl.exp(b_more - b_base[:, None])
            b_sum = b_sum * tl.exp(b_most - b_base) + tl.sum(b_parts, axis=1)
            b_most = b_next
            i_s += BS
        m_some = b_sum != 0
        p_l = p_logits + o_row[:, None] * T + o_t[None, :]
        b_l = tl.load(p_l, mask=m_r[:, None] & m_t[None, :], other=float("-inf"))
        b_e = tl.exp(b_l - tl.where(m_some, b_most, 0.0)[:, None]) / tl.where(m_some, b_sum, 1.0)[:, None]
        b_scores += tl.sum(b_e, axis=0)
        counted += m_some.to(tl.float32)
        i_r += BR
    tl.store(p_scores + i_b * T + o_t, b_scores / tl.maximum(tl.sum(counted, axis=0), 1.0), mask=m_t)


@triton.jit
def copy_row(p_y, p_x, i_row, i_b, column, K, s_b, s_t, within, BLOCK: tl.constexpr):
    """Row i_row of y [B n, K] is x[i_b, column], or zeros where the column is not within T."""
    o_k = tl.arange(0, BLOCK)
    i_k = 0
    while i_k < K:
        m_k = i_k + o_k < K
        b_x = tl.load(p_x + i_b * s_b + column * s_t + i_k + o_k, mask=tl.where(within, m_k, False), other=0)
        tl.store(p_y + i_row * K + i_k + o_k, b_x, mask=m_k)
        i_k += BLOCK


@triton.jit(do_not_specialize=["n", "T"])
def gather_kernel(
    p_y0,  # [B, n, K0], words of what is gathered
    p_y1,
    p_y2,
    p_y3,
    p_x0,  # [B or 1, T, K0]
    p_x1,
    p_x2,
    p_x3,
    p_columns,  # [B, n] int64
    n,
    T,
    K0,
    K1,
    K2,
    K3,
    s_b0,
    s_b1,
    s_b2,
    s_b3,
    s_t0,
    s_t1,
    s_t2,
    s_t3,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one token of all COUNT tensors."""
    i_row = tl.program_id(0).to(tl.int64)
    i_b = i_row // n
    column = tl.load(p_columns + i_row)
    within = (column >= 0) & (column < T)
    copy_row(p_y0, p_x0, i_row, i_b, column, K0, s_b0, s_t0, within, BLOCK)
    if COUNT > 1:
        copy_row(p_y1, p_x1, i_row, i_b, column, K1, s_b1, s_t1, within, BLOCK)
    if COUNT > 2:
        copy_row(p_y2, p_x2, i_row, i_b, column, K2, s_b2, s_t2, within, BLOCK)
    if COUNT > 3:
        copy_row(p_y3, p_x3, i_row, i_b, column, K3, s_b3, s_t3, within, BLOCK)


def logits_tile(rows: int, D: int, dtype: torch.dtype) -> dict[str, int]:
    """Constexprs of logits_kernel for so many rows of logits on a head of keys: 8 to 16 KB of keys a program."""
    use_dot, BD = rows > VECTOR_ROWS, triton.next_power_of_2(D)
    BR = MOST_ROWS if use_dot else triton.next_power_of_2(rows)
    BD = max(BD, 16) if use_dot else BD
    BT = 8192 // BD // (dtype.itemsize // 2) // (1 if use_dot else BR)
    return {"BR": BR, "BT": max(16, min(BT, 128)), "BD": BD, "USE_DOT": use_dot}


def token_scores(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float, softcap: float | None
) -> torch.Tensor:
    """query [B, Q, H, D], contiguous, key [B, G, T, D] with a last stride of 1, mask bool [B, 1 or Q, T], contiguous,
    or None -> float32 [B, T]; no size is 0."""
    (B, Q, H, D), (G, T) = query.shape, key.shape[1:3]
    tile = logits_tile(Q * H // G, D, query.dtype)
    blocks = triton.cdiv(T, tile["BT"])
    floats = {"dtype": torch.float32, "device": query.device}
    scores, logits = torch.empty(B, T, **floats), torch.empty(B, H, Q, T, **floats)
    most, total = torch.empty(B, H, Q, blocks, **floats), torch.empty(B, H, Q, blocks, **floats)
    options = {"num_warps": NUM_WARPS, **OPTIONS}
    mask = None if mask is None else mask.view(torch.uint8)
    s_mask = (0, 0) if mask is None else (mask.stride(0), mask.stride(1) if mask.shape[1] > 1 else 0)
    with torch.cuda.device_of(query):
        logits_kernel[(blocks, triton.cdiv(Q * H // G, tile["BR"]), B * G)](
            logits,
            most,
            total,
            query,
            key,
            mask,
            scale,
            softcap or 0.0,
            Q,
            H,
            G,
            T,
            D,
            *key.stride()[:3],
            *s_mask,
            **tile,
            HAS_MASK=mask is not None,
            HAS_SOFTCAP=softcap is not None,
            **options,
        )
        mean_kernel[(triton.cdiv(T, MEAN_TILE["BT"]), B)](
            scores, logits, most, total, H * Q, T, blocks, **MEAN_TILE, **options
        )
    return scores


def gather_block(longest: int) -> int:
    """Words that a program copies at once: four a thread, or fewer where all rows are short."""
    return min(triton.next_power_of_2(max(longest, 1)), 4 * THREADS)


def gather_tokens(tensors: list[torch.Tensor], columns: torch.Tensor) -> list[torch.Tensor]:
    """tensors [B or 1, T, ...] whose rows are contiguous, columns int64 [B, n], contiguous -> [B, n, ...] each; zeros
    for columns outside of 0 to T - 1."""
    gathered = [torch.empty(*columns.shape, *x.shape[2:], dtype=x.dtype, device=x.device) for x in tensors]
    for first in range(0, len(tensors), GATHERED):
        _gather(gathered[first : first + GATHERED], tensors[first : first + GATHERED], columns)
    return gathered


def _gather(gathered, tensors, columns):
    pairs = [as_words(y, x) for y, x in zip(gathered, tensors, strict=True) if y.numel()]
    if not pairs:
        return
    missing = GATHERED - len(pairs)
    ys, xs = zip(*pairs, strict=True)
    lengths = [x.shape[2] for x in xs]
    with torch.cuda.device_of(columns):
        gather_kernel[(columns.numel(),)](
            *ys,
            *[None] * missing,
            *xs,
            *[None] * missing,
            columns,
            columns.shape[1],
            tensors[0].shape[1],
            *lengths,
            *[1] * missing,
            *(x.stride(0) if len(x) > 1 else 0 for x in xs),
            *[1] * missing,
            *(x.stride(1) for x in xs),
            *[1] * missing,
            COUNT=len(pairs),
            BLOCK=gather_block(max(lengths)),
            num_warps=NUM_WARPS,
            **OPTIONS,
        )


def as_words(y: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """y [B, n, ...] and x [B or 1, T, ...] as [..., K] of the widest integers that all rows consist of."""
    K = x.shape[2:].numel()
    bytes_apart = [elements * x.element_size() for elements in (K, *x.stride()[:2], x.storage_offset())]
    word = next(word for width, word in WORDS.items() if all(apart % width == 0 for apart in bytes_apart))
    rows = x.as_strided((*x.shape[:2], K), (*x.stride()[:2], 1))
    return y.view(*y.shape[:2], K).view(word), rows.view(word)
