"""Calls every compiled kernel on tensors whose neighbours in memory cannot be read or written: a process that touches
them ends by a signal. `python guard_pages.py` prints every case before it runs it.

Each call runs with all its tensors, outputs too, directly before such a page and directly behind one, and gives the
bits that it gives on ordinary tensors.
"""

import ctypes
import itertools
import mmap
from contextlib import ExitStack
from unittest.mock import patch

import torch

from hasten.kernels import cpu, storage
from hasten.kernels.causal_conv1d import causal_conv1d, causal_conv1d_update
from hasten.kernels.column_sparse_linear import column_sparse_linear
from hasten.kernels.expert_linear import expert_linear
from hasten.kernels.linear import linear
from hasten.kernels.recurrence.delta_rule import delta_rule, delta_rule_step
from hasten.kernels.recurrence.linear_attention import linear_attention, linear_attention_step
from hasten.kernels.recurrence.selective_scan import selective_scan, selective_scan_step
from hasten.kernels.recurrence.wkv import wkv
from hasten.kernels.row_sparse_linear import row_sparse_linear
from hasten.kernels.suffix_array import suffix_array
from hasten.kernels.token_scores import token_scores
from hasten.kernels.transpose import transpose

PAGE = mmap.PAGESIZE
PLACES = ("before", "behind")
SIZES = [(1, 1, 1), (1, 37, 53), (2, 129, 67), (3, 66, 31), (5, 1, 130), (8, 33, 1)]  # B, N, K
libc = ctypes.CDLL(None)


def guarded(shape, dtype: torch.dtype, place: str) -> torch.Tensor:
    """A contiguous tensor of NaN (or the largest integer, or True) that ends where a forbidden page begins, or the reverse."""
    count = torch.Size(shape).numel()
    if not count:
        return torch.zeros(shape, dtype=dtype)
    size = count * dtype.itemsize
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, pages + 1):
        assert libc.mprotect(ctypes.c_void_p(base + page * PAGE), ctypes.c_size_t(PAGE), 0) == 0
    begin = PAGE + (pages * PAGE - size if place == "before" else 0)
    tensor = torch.frombuffer(memory, dtype=dtype, count=count, offset=begin).view(shape)
    if dtype == torch.bool:
        return tensor.fill_(True)
    return tensor.fill_(torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max)


def moved(value, place: str):
    """A tensor of the same values and layout between forbidden pages; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    order = sorted(range(value.dim()), key=value.stride, reverse=True)
    back = [order.index(dimension) for dimension in range(value.dim())]
    laid = value.permute(order)
    return guarded(laid.shape, value.dtype, place).copy_(laid).permute(back)


def run(operator, arguments, settings, place: str | None) -> list[torch.Tensor]:
    """The outputs, and the tensors that may have been changed in place."""
    if place is None:
        arguments = [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments]
        found = operator(*arguments, **settings)
    else:
        arguments = [moved(value, place) for value in arguments]
        settings = {name: moved(value, place) for name, value in settings.items()}
        with ExitStack() as stack:
            for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
                stack.enter_context(patch.object(owner, name, allocator(getattr(owner, name), place)))
            found = operator(*arguments, **settings)
    outputs = found if isinstance(found, tuple) else (found,)
    return [*outputs, *(value for value in arguments if isinstance(value, torch.Tensor))]


def allocator(allocate, place: str):
    """What allocates as `allocate` does, between forbidden pages."""

    def allocate_guarded(*arguments, **settings):
        made = allocate(*arguments, **settings)
        return moved(made, place) if made.is_cpu else made

    return allocate_guarded


def linears(dtype):
    for (B, N, K), with_bias in itertools.product(SIZES, (False, True)):
        x, weight = torch.randn(B, K, dtype=dtype), torch.randn(N, K, dtype=dtype)
        columns = storage.to_column_major(weight)
        bias = torch.randn(N, dtype=dtype) if with_bias else None
        yield linear, (x, weight, bias), {}
        for cutoff in (None, torch.rand(K), torch.full((K,), -1.0), torch.full((K,), torch.inf)):
            yield column_sparse_linear, (x, columns, cutoff, bias), {}
        for threshold in (0.6, -1.0, torch.inf):
            gate = torch.randn(B, N, dtype=dtype)
            yield row_sparse_linear, (x, weight, gate, torch.tensor(threshold), bias), {}
        if not with_bias:
            yield transpose, (weight,), {}
            yield transpose, (torch.randn(3, N, K, dtype=dtype),), {}


def experts(dtype):
    for (T, N, K), P, E in itertools.product(SIZES, (1, 3, 11), (1, 5)):
        weight, bias = torch.randn(E, N, K, dtype=dtype), torch.randn(E, N, dtype=dtype)
        ids = torch.randint(-1, E + 1, (T, P))
        columns = storage.to_column_major(weight)
        for x in (torch.randn(T, K, dtype=dtype), torch.randn(T, P, K, dtype=dtype)):
            yield expert_linear, (x, weight, ids), {"bias": bias}
            yield expert_linear, (x, columns, ids), {"bias": bias}
            yield expert_linear, (x, columns, ids), {"cutoff": torch.rand(E, K)}
    far = torch.tensor([[1 << 40, -(1 << 62), 2]])
    yield expert_linear, (torch.randn(1, 5, dtype=dtype), torch.randn(3, 7, 5, dtype=dtype), far), {}


def convolutions(dtype):
    for D, T, W in [(1, 1, 1), (3, 2, 4), (33, 7, 4), (17, 35, 8), (520, 3, 2)]:
        x, weight, bias = torch.randn(2, D, T, dtype=dtype), torch.randn(D, W, dtype=dtype), torch.randn(D, dtype=dtype)
        before = torch.randn(2, D, W - 1, dtype=dtype)
        for laid in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
            yield causal_conv1d, (laid, weight, bias), {"initial_state": before, "activation": "silu"}
            yield causal_conv1d, (laid, weight), {"return_state": True}
        if T > 1:
            bounds = torch.tensor([0, 1, T])
            yield causal_conv1d, (x[:1].clone(), weight, bias), {"initial_state": before, "cu_seqlens": bounds}
        for S in (W - 1, W + 2):
            yield causal_conv1d_update, (x, torch.randn(2, D, S, dtype=dtype), weight, bias), {"activation": "silu"}


def recurrences(dtype):
    H, Hv = 2, 4
    for T, K, V in [(1, 1, 1), (1, 24, 17), (5, 17, 40), (16, 16, 16), (65, 33, 33), (130, 7, 18)]:
        q, k = torch.randn(2, 2, T, H, K).to(dtype)
        v, beta = torch.randn(2, T, Hv, V).to(dtype), torch.rand(2, T, Hv)
        for shape in (None, (Hv,), (2, T, Hv), (2, T, Hv, K)):
            decay = None if shape is None else -torch.rand(shape)
            state = torch.randn(2, Hv, K, V)
            settings = {"decay": decay, "initial_state": state, "return_state": True}
            yield linear_attention, (q, k, v), settings
            yield delta_rule, (q, k, v, beta), settings | {"l2_norm": True}
            if T < 16:
                for laid in (state, state.mT.contiguous().mT):
                    yield linear_attention_step, (q, k, v, laid), {"decay": decay}
                    yield delta_rule_step, (q, k, v, beta, laid), {"decay": decay, "l2_norm": True}
        if T > 2:
            bounds = {"cu_seqlens": torch.tensor([0, 2, T])}
            yield linear_attention, (q[:1].clone(), k[:1].clone(), v[:1].clone()), bounds
            yield delta_rule, tuple(x[:1].clone() for x in (q, k, v, beta)), bounds | {"l2_norm": True}


def scans(dtype):
    for T, D, N in [(1, 1, 1), (1, 33, 16), (1, 70, 3), (5, 17, 33), (33, 32, 16), (70, 45, 8)]:
        x, dt, z = torch.randn(3, 2, T, D).to(dtype)
        A, (B, C), state = -torch.rand(D, N), torch.randn(2, 2, T, N).to(dtype), torch.randn(2, D, N)
        more = {"D": torch.randn(D), "dt_bias": torch.randn(D), "dt_softplus": True}
        for lay in (lambda x: x.clone(), lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)):
            tokens, gate = tuple(map(lay, (x, dt))), {"z": lay(z)}
            arguments = (*tokens, A, lay(B), lay(C))
            yield selective_scan, arguments, more | gate | {"initial_state": state, "return_state": True}
            if T < 6:
                yield selective_scan_step, (*arguments, state), more | gate
        yield selective_scan, (x, dt.abs(), A, B, C), {}
        if T > 2:
            arguments = (x[:1].clone(), dt[:1].clone(), A, B[:1].clone(), C[:1].clone())
            yield selective_scan, arguments, {"cu_seqlens": torch.tensor([0, 2, T]), "dt_softplus": True}


def weighted_means(dtype):
    for T, D in [(1, 1), (1, 33), (5, 70), (9, 64)]:
        tensors, state = (*torch.randn(2, D), *torch.randn(2, 2, T, D).to(dtype)), torch.randn(3, 2, D).unbind()

        def with_state(*arguments):
            y, after = wkv(*arguments[:4], state=arguments[4:] or None, return_state=True)
            return y, *after

        yield with_state, tensors, {}
        yield with_state, (*tensors, *state), {}


def attention(dtype):
    for Q, H, G, T, D in [
        (1, 1, 1, 1, 1),
        (1, 7, 1, 37, 72),
        (3, 4, 2, 129, 33),
        (1, 8, 8, 16, 64),
        (2, 6, 2, 300, 128),
    ]:
        query, key = torch.randn(2, Q, H, D).to(dtype), torch.randn(2, G, T, D).to(dtype)
        for mask in (None, torch.rand(2, T) > 0.5, torch.rand(2, Q, T) > 0.5):
            yield token_scores, (query, key, mask), {}
        others = {"scale": 0.1, "softcap": 2.0}
        yield token_scores, (query, key.transpose(1, 2).contiguous().transpose(1, 2)), others


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    texts = [(suffix_array, (torch.randint(3, (size,)).to(torch.uint8),), {}) for size in (1, 2, 63, 64, 500)]
    calls = itertools.chain(
        *(
            kind(dtype)
            for kind in (linears, experts, convolutions, recurrences, scans, weighted_means, attention)
            for dtype in storage.DTYPE_CODES
        ),
        texts,
    )
    for count, (operator, arguments, settings) in enumerate(calls):
        shapes = [list(value.shape) for value in (*arguments, *settings.values()) if isinstance(value, torch.Tensor)]
        print(count, operator.__name__, arguments[0].dtype, *shapes, flush=True)
        expected = run(operator, arguments, settings, None)
        for place in PLACES:
            found = run(operator, arguments, settings, place)
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    print(f"{count + 1} calls on {cpu.isa()}: nothing beside the tensors was touched")


if __name__ == "__main__":
    main()
