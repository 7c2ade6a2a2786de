"""The compiled product, and how fast it is in each instruction set."""

import time

import torch

from .. import cpu

SIZE, REPEATS, ROUNDS = 128, 8, 5


class TileProductArguments(cpu.Arguments):
    __slots__ = ()
    _fields_ = (
        ("c", cpu.POINTER),
        ("a", cpu.POINTER),
        ("b", cpu.POINTER),
        ("M", cpu.SIZE),
        ("N", cpu.SIZE),
        ("K", cpu.SIZE),
        ("repeats", cpu.SIZE),
    )


_tile_product = cpu.Function("tile_product", TileProductArguments)


def launch(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [M, K], b [K, N], bfloat16 and contiguous -> a b [M, N] in float32."""
    c = torch.empty(a.shape[0], b.shape[1], dtype=torch.float32, device="cpu")
    _tile_product(_arguments(a, b, c, 1))
    return c


def rate(isa: str) -> float:
    """Operations per second of products of 128 x 128 in one thread, in this instruction set."""
    a, b = torch.ones(2, SIZE, SIZE, dtype=torch.bfloat16, device="cpu")
    c = torch.empty(SIZE, SIZE, dtype=torch.float32, device="cpu")
    arguments = [_arguments(a, b, c, repeats) for repeats in (1, 1 + REPEATS)]
    once, often = (min(_seconds(call, isa) for _ in range(ROUNDS)) for call in arguments)
    # The difference of both is what packing has no part in.
    return 2 * SIZE**3 * REPEATS / (often - once if often > once else often)


def _seconds(call: TileProductArguments, isa: str) -> float:
    begin = time.perf_counter()
    _tile_product(call, isa)
    return time.perf_counter() - begin


def _arguments(a, b, c, repeats) -> TileProductArguments:
    (M, K), N = a.shape, b.shape[1]
    return TileProductArguments(c=c.data_ptr(), a=a.data_ptr(), b=b.data_ptr(), M=M, N=N, K=K, repeats=repeats)
