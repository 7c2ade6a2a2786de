"""Linear attention: prefill against softmax attention and against our own form in plain torch,
and the decode step against torch."""

import importlib.util
import math
from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from torch.nn.functional import logsigmoid, scaled_dot_product_attention, softplus

from hasten.kernels.recurrence.linear_attention import chunked, linear_attention, linear_attention_step

from ..runner import COLD_BYTES, OURS, Case, copies

LENGTHS = {"cpu": [1024, 4096, 16384, 65536], "cuda": [2048, 8192, 32768, 131072]}
LONGEST_SOFTMAX = {"cpu": 16384, "cuda": 131072}  # beyond it softmax attention takes minutes
TYPICAL = {"cpu": 4096, "cuda": 8192}
HEADS, SIZE = {"cpu": 8, "cuda": 32}, 128
STEP_HEADS = 32
STATE_BYTES = STEP_HEADS * SIZE * SIZE * 4


def cases(device: str) -> list[Case]:
    found = [_prefill(T, "constant", torch.bfloat16, device) for T in LENGTHS[device]]
    found += [_prefill(TYPICAL[device], kind, torch.bfloat16, device) for kind in ("scalar", "vector")]
    found.append(
        _prefill(TYPICAL[device], "constant", torch.float32, device)
    )  # softmax attention in float16 takes minutes on a CPU
    return found + [_step(dtype, device) for dtype in (torch.bfloat16, torch.float32)]


def log_decay(kind: str, T: int, heads: int, device: str) -> torch.Tensor:
    """As models have them: the slopes of MiniMax (lightning attention), Mamba-2 at its initialisation, GLA's gates."""
    if kind == "constant":
        return -(2 ** (-8 * torch.arange(1, heads + 1, device=device) / heads))
    if kind == "scalar":
        dt = softplus(torch.randn(1, T, heads, device=device) + inverse_softplus(time_steps(heads, device)))
        return -torch.linspace(1, 16, heads, device=device) * dt
    return logsigmoid(torch.randn(1, T, heads, SIZE, device=device)) / 16


def time_steps(count: int, device: str) -> torch.Tensor:
    """As Mamba initialises them: log-uniform from 0.001 to 0.1."""
    return torch.exp(torch.rand(count, device=device) * math.log(100) + math.log(1e-3))


def inverse_softplus(x: torch.Tensor) -> torch.Tensor:
    return x + torch.log(-torch.expm1(-x))


def operations(T: int, heads: int, chunk: int = 64) -> int:
    """Of the chunked form: reading and writing the state, and the lower triangles within a chunk."""
    return T * heads * (2 * 2 * SIZE * SIZE + 2 * 2 * SIZE * (chunk // 2))


def flash_linear_attention(device: str) -> ModuleType | None:
    """The peer's operators, where they can run and are installed."""
    return importlib.import_module("fla.ops") if device == "cuda" and importlib.util.find_spec("fla") else None


def captured(call: Callable[[], torch.Tensor], device: str) -> Callable[[], object]:
    """On a GPU the replay of a CUDA graph of `call`, which is how decode runs where launches would cost
    more than the work."""
    if device != "cuda":
        return call
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def cold_states(device: str) -> list[torch.Tensor]:
    return [torch.zeros(1, STEP_HEADS, SIZE, SIZE, device=device) for _ in range(1 + COLD_BYTES[device] // STATE_BYTES)]


def cold_tokens(T: int, heads: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """q, k and v in one tensor [3, 1, T, heads, SIZE], as often as makes them cold."""
    return copies(torch.randn(3, 1, T, heads, SIZE, dtype=dtype, device=device))


def _prefill(T: int, kind: str, dtype: torch.dtype, device: str) -> Case:
    heads = HEADS[device]

    def make():
        inputs = cold_tokens(T, heads, dtype, device)
        decay = log_decay(kind, T, heads, device)
        contenders = {
            OURS: [partial(linear_attention, *qkv, decay=decay) for qkv in inputs],
            "hasten in torch": [partial(chunked.linear_attention, *qkv, decay, 1.0, None) for qkv in inputs],
        }
        if kind == "constant" and LONGEST_SOFTMAX[device] >= T:
            contenders["scaled_dot_product_attention"] = [
                partial(scaled_dot_product_attention, *qkv.transpose(2, 3).contiguous(), is_causal=True)
                for qkv in inputs
            ]
        if fla := flash_linear_attention(device):
            peer, decays = {
                "constant": (fla.chunk_simple_gla, {"g_gamma": decay}),
                "scalar": (fla.chunk_simple_gla, {"g": decay}),
                "vector": (fla.chunk_gla, {"g": decay}),
            }[kind]
            contenders["flash-linear-attention"] = [partial(peer, *qkv, **decays, scale=1.0) for qkv in inputs]
        return contenders

    moved = 4 * T * heads * SIZE * dtype.itemsize
    name = f"prefill {T} tokens, {kind} decay"
    return Case("linear_attention", name, dtype, device, moved, make, operations(T, heads))


def _step(dtype: torch.dtype, device: str) -> Case:
    def make():
        q, k, v = torch.randn(3, 1, 1, STEP_HEADS, SIZE, dtype=dtype, device=device)
        decay = log_decay("constant", 1, STEP_HEADS, device)
        states = cold_states(device)
        ours = [partial(linear_attention_step, q, k, v, state, decay=decay) for state in states]
        theirs = [partial(_torch_step, q, k, v, state, decay) for state in states]
        return {OURS: [captured(call, device) for call in ours], "torch": [captured(call, device) for call in theirs]}

    return Case("linear_attention_step", f"{STEP_HEADS} heads of {SIZE}", dtype, device, 2 * STATE_BYTES, make)


def _torch_step(q, k, v, state, decay):
    """The step as one writes it in torch: the state is multiplied and added to in place, then read."""
    dtype = q.dtype
    q, k, v = (x[:, 0].float() for x in (q, k, v))
    state.mul_(decay.exp()[:, None, None]).add_(k[..., None] * v[..., None, :])
    return (q[..., None, :] @ state)[..., 0, :].to(dtype)
