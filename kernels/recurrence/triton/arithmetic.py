"""What the kernels of the recurrences share: where a chunk lies, decays and their sums, products of tiles.

A chunk is C tokens from where a sequence begins. Its slot is its row in buffers of one row a chunk. Decays enter as
exp of sums of their logarithms that are at most 0, and no such sum is a difference of large ones.
"""

import triton
import triton.language as tl

VECTOR = tl.constexpr(2)  # kinds of decay: 1, one number per head; 2, one per component of k


@triton.jit
def locate(p_bounds, i_s, T, N, C: tl.constexpr, PACKED: tl.constexpr):
    """Slot i_s -> (its first token, the end of its sequence, whether p_bounds rise from 0 to T).

    Sequence n of packed ones has its slots from bounds[n] // C + n on: nobody needs to count the chunks of those before
    it, and T // C + N slots suffice. The end is not behind the first token where a slot is left over.
    """
    if PACKED:
        i_n = tl.full([], -1, dtype=tl.int32)
        broken = ((tl.load(p_bounds) != 0) | (tl.load(p_bounds + N) != T)).to(tl.int32)
        for i in range(0, N, 64):
            o_n = i + tl.arange(0, 64)
            b_begin = tl.load(p_bounds + o_n, mask=o_n < N, other=0).to(tl.int64)
            b_end = tl.load(p_bounds + o_n + 1, mask=o_n < N, other=1).to(tl.int64)
            i_n += tl.sum(((o_n < N) & (b_begin // C + o_n <= i_s)).to(tl.int32), axis=0)
            broken += tl.sum((b_end <= b_begin).to(tl.int32), axis=0)
        i_n = tl.maximum(i_n, 0)
        begin = tl.load(p_bounds + i_n).to(tl.int64)
        i_t = begin + (i_s - begin // C - i_n) * C
        end = tl.load(p_bounds + i_n + 1).to(tl.int64)
        valid = broken == 0
    else:
        chunks = (T + C - 1) // C
        begin = (i_s // chunks).to(tl.int64) * T
        i_t = begin + i_s % chunks * C
        end = begin + T
        valid = i_s >= 0
    return i_t, end, valid


@triton.jit
def sane(b_g):
    """Logarithms whose sums are finite: exp(-104) is 0 in fp32, like exp(-inf). What is positive is no decay."""
    b_g = b_g.to(tl.float32)
    return tl.where(b_g > 0, float("nan"), tl.where(b_g < -104.0, -104.0, b_g))


@triton.jit
def decline(b_x):
    """exp(x) - 1 for x <= 0. What a state loses in a chunk adds up over thousands of chunks, and exp(x) near 1 would be
    rounded in the same direction each time."""
    b_series = b_x * (1 + b_x / 2 * (1 + b_x / 3 * (1 + b_x / 4 * (1 + b_x / 5 * (1 + b_x / 6)))))
    return tl.where(b_x > -0.25, b_series, tl.exp(b_x) - 1)


@triton.jit
def spans(b_g):
    """Logarithms [C] -> their sums over the tokens j + 1 to i, [C, C], and 0 where i < j.

    A difference of sums that start with the chunk would lose digits after a large decay. Multiples of 2^-11 do not:
    64 of them down to -104 add up exactly in fp32, and what is left of each is added up apart.
    """
    b_coarse = tl.floor(b_g * 2048 + 0.5) / 2048
    b_fine = tl.cumsum(b_g - b_coarse, axis=0)
    b_coarse = tl.cumsum(b_coarse, axis=0)
    b_sums = (b_coarse[:, None] - b_coarse[None, :]) + (b_fine[:, None] - b_fine[None, :])
    o_c = tl.arange(0, b_g.shape[0])
    return tl.where(o_c[:, None] >= o_c[None, :], b_sums, 0.0)


@triton.jit
def across(o_c, half):
    """Pairs (i, j) of a block of 2 half tokens, i in its second half and j in its first: [C, C]."""
    o_half = o_c // half
    return (o_half % 2 == 1)[:, None] & (o_half[:, None] == o_half[None, :] + 1)


@triton.jit
def rounded(b_x):
    """To the nearest tf32, ties away from zero: tensor cores would cut off. NaN stays NaN, whatever its bits."""
    b_bits = (b_x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(b_x == b_x, b_bits.to(tl.float32, bitcast=True), b_x)


@triton.jit
def operand(b_x, PRECISION: tl.constexpr):
    if PRECISION == "bf16":
        b_x = b_x.to(tl.bfloat16)
    elif PRECISION == "tf32" and b_x.dtype == tl.float32:
        b_x = rounded(b_x)
    else:
        b_x = b_x.to(tl.float32)
    return b_x


@triton.jit
def product(b_x, b_y, PRECISION: tl.constexpr):
    """x y in fp32, of operands rounded to bf16 or tf32, or ("tf32x3", "ieee") as they are.

    float16 inputs are multiplied as they are where both operands are inputs. What is computed from them (decayed,
    summed up, corrected) leaves the range of float16, and tf32 is as fine.
    """
    if b_x.dtype == tl.float16 and b_y.dtype == tl.float16:
        b_z = tl.dot(b_x, b_y)
    elif PRECISION == "bf16":
        b_z = tl.dot(operand(b_x, PRECISION), operand(b_y, PRECISION))
    else:
        b_z = tl.dot(operand(b_x, PRECISION), operand(b_y, PRECISION), input_precision=PRECISION)
    return b_z


@triton.jit
def lower_product(b_P, b_u, PRECISION: tl.constexpr):
    """P u of a lower triangle P [C, C] and u [C, BV]: what is not finite in a token of u reaches that token and those
    after it, never those before, which only a 0 of P keeps from it."""
    C: tl.constexpr = b_u.shape[0]
    o_c = tl.arange(0, C)[:, None]
    m_finite = tl.abs(b_u.to(tl.float32)) < float("inf")
    first = tl.min(tl.where(m_finite, C, o_c), axis=0)  # [BV]
    b_o = product(b_P, tl.where(m_finite, b_u, 0.0).to(b_u.dtype), PRECISION)
    return tl.where(o_c >= first[None, :], float("nan"), b_o)
