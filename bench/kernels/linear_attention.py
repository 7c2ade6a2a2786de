"""Linear attention: prefill against softmax attention and against our own form in plain torch, and the decode step against torch."""

from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from hasten.kernels.linear_attention import chunked, linear_attention, linear_attention_step

from ..runner import OURS, Case

LENGTHS = [1024, 4096, 16384, 65536]
LONGEST_SOFTMAX = 16384  # beyond it softmax attention takes minutes
HEADS, SIZE = 8, 128
STEP_HEADS = 32
DECAYS = {"constant": (), "scalar": (1,), "vector": (1, SIZE)}  # dimensions after [B, T] and the heads


def cases(device: str) -> list[Case]:
    found = [
        _prefill(T, decay, torch.bfloat16, device)
        for T in LENGTHS
        for decay in DECAYS
        if decay == "constant" or T == 4096
    ]
    found += [_prefill(4096, "constant", dtype, device) for dtype in (torch.float32, torch.float16)]
    return found + [_step(dtype, device) for dtype in (torch.bfloat16, torch.float32)]


def log_decay(kind: str, T: int, heads: int, device: str) -> torch.Tensor:
    shape = {"constant": (heads,), "scalar": (1, T, heads), "vector": (1, T, heads, SIZE)}[kind]
    return -torch.rand(shape, device=device)


def operations(T: int, heads: int, chunk: int = 64) -> int:
    """Of the chunked form: reading and writing the state, and the lower triangles within a chunk."""
    return T * heads * (2 * 2 * SIZE * SIZE + 2 * 2 * SIZE * (chunk // 2))


def _prefill(T: int, kind: str, dtype: torch.dtype, device: str) -> Case:
    def make():
        q, k, v = torch.randn(3, 1, T, HEADS, SIZE, dtype=dtype, device=device)
        decay = log_decay(kind, T, HEADS, device)
        contenders = {
            OURS: [partial(linear_attention, q, k, v, decay=decay)],
            "hasten in torch": [partial(chunked.linear_attention, q, k, v, decay, 1.0, None)],
        }
        if T <= LONGEST_SOFTMAX:
            heads_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
            contenders["scaled_dot_product_attention"] = [
                partial(scaled_dot_product_attention, *heads_first, is_causal=True)
            ]
        return contenders

    moved = 4 * T * HEADS * SIZE * dtype.itemsize
    name = f"prefill {T} tokens, {kind} decay"
    return Case("linear_attention", name, dtype, device, moved, make, operations(T, HEADS))


def _step(dtype: torch.dtype, device: str) -> Case:
    def make():
        q, k, v = torch.randn(3, 1, 1, STEP_HEADS, SIZE, dtype=dtype, device=device)
        decay = log_decay("constant", 1, STEP_HEADS, device)
        states = [
            torch.zeros(1, STEP_HEADS, SIZE, SIZE, device=device)
            for _ in range(1 + (600 << 20) // (STEP_HEADS * SIZE * SIZE * 4))
        ]
        return {
            OURS: [partial(linear_attention_step, q, k, v, state, decay=decay) for state in states],
            "torch": [partial(_torch_step, q, k, v, state, decay) for state in states],
        }

    moved = 2 * STEP_HEADS * SIZE * SIZE * 4
    return Case("linear_attention_step", f"{STEP_HEADS} heads of {SIZE}", dtype, device, moved, make)


def _torch_step(q, k, v, state, decay):
    """The step as one writes it in torch: the state is multiplied and added to in place, then read."""
    dtype = q.dtype
    q, k, v = (x[:, 0].float() for x in (q, k, v))
    state.mul_(decay.exp()[:, None, None]).add_(k[..., None] * v[..., None, :])
    return (q[..., None, :] @ state)[..., 0, :].to(dtype)
