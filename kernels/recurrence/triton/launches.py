"""Which tiles and how many programs the kernels of the recurrences take, and their launches.

Nothing here waits for the device: a launch can be captured in a CUDA graph, packed sequences too.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton

from ...triton_common import OPTIONS, multiprocessors
from .corrections import corrections_kernel
from .outputs import outputs_kernel
from .pairs import pairs_kernel
from .states import states_kernel, weights_kernel
from .step import step_kernel

MAX_K = 512
NONE, SCALAR, VECTOR = 0, 1, 2  # kinds of decay; prefill takes none at all as a scalar 0 for every head


@dataclass(frozen=True)
class Device:
    """What tiles depend on."""

    multiprocessors: int = 132
    hip: bool = False
    max_warps: int = 8  # of a program whose loop feeds one tl.dot with another's result


@dataclass(frozen=True)
class Grid:
    """One kernel's launch: how many programs, along the only axis that may exceed 65,535, and its options."""

    programs: int
    tile: dict[str, int | str]
    num_warps: int
    num_stages: int

    def options(self) -> dict:
        return {**self.tile, "num_warps": self.num_warps, "num_stages": self.num_stages, **OPTIONS}


def precision(dtype: torch.dtype, hip: bool) -> str:
    """Of products: bfloat16 in bf16; float16 in tf32, since what is decayed or summed up leaves its range; float32 in
    three products of tf32, which are as fine as fp32. AMD's matrix units have fp32 itself."""
    if dtype == torch.bfloat16:
        return "bf16"
    return "ieee" if hip else "tf32" if dtype == torch.float16 else "tf32x3"


def solve_precision(dtype: torch.dtype, hip: bool) -> str:
    """Of what the delta rule solves for within a chunk, which magnifies the errors of products of keys: finer."""
    return "ieee" if hip else "tf32" if dtype == torch.bfloat16 else "tf32x3"


def buffer_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of what one kernel leaves to the next, and of the states that outputs read."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def chunk(K: int, dtype: torch.dtype) -> int:
    """Tokens of a chunk: as many as registers and shared memory hold beside a state of K rows."""
    return 64 if dtype == torch.bfloat16 and K <= 256 else 32


def slots(N: int, T: int, C: int, packed: bool) -> int:
    """Chunks of N sequences of T tokens, or at most those of N packed in T."""
    return T // C + N if packed else N * triton.cdiv(T, C)


def grids(
    N: int, T: int, Hv: int, K: int, V: int, dtype: torch.dtype, kind: int, delta: bool, packed: bool, device: Device
) -> dict[str, Grid]:
    """The launches of whole sequences, by the names of their kernels, in order."""
    C, half = chunk(K, dtype), dtype == torch.bfloat16
    per_chunk = slots(N, T, C, packed) * Hv
    BK = min(64 if half else 32, _power(K))
    wide_warps, warps = min(8, device.max_warps), min(4, device.max_warps)
    chunked = {"C": C, "PACKED": packed}
    finer = solve_precision(dtype, device.hip)
    common = {**chunked, "DECAY": kind, "PRECISION": precision(dtype, device.hip)}
    found = {}
    if kind == VECTOR:
        tile = {**common, "BK": max(16, BK // 2), "SOLVE_PRECISION": finer, "DELTA": delta}
        del tile["DECAY"]
        found["pairs"] = Grid(per_chunk, tile, wide_warps if delta and half else warps, 1)
    if delta:
        tile = {**common, "BK": BK, "BV": min(BK, _power(V)), "SOLVE_PRECISION": finer}
        found["corrections"] = Grid(per_chunk, tile, warps, 1)
    elif kind == SCALAR:
        found["weights"] = Grid(per_chunk, chunked, 1, 1)
    found["states"] = _states(N, Hv, K, V, half, delta, device, common)
    tile = {**common, "BK": BK, "BV": min(128 if half else 64, _power(V))}
    programs = per_chunk * triton.cdiv(V, tile["BV"])
    stages = 2 if half and not device.hip else 1
    found["outputs"] = Grid(programs, tile, wide_warps if tile["BV"] > 64 else warps, stages)
    return found


def _states(N, Hv, K, V, half, delta, device, tile) -> Grid:
    """Blocks of 64 x 64, or of all of K x 32 for the delta rule, halved while multiprocessors are left without one."""
    BK, BV = (_power(K), min(32, _power(V))) if delta else (min(64, _power(K)), min(64, _power(V)))
    few = N * Hv * triton.cdiv(K, BK) * triton.cdiv(V, BV) < device.multiprocessors
    if delta and (few or BK > 128 or not half):
        BV = 16
    elif not delta and (few or not half):
        BK, BV = min(32, BK), min(32, BV)
    programs = N * Hv * triton.cdiv(K, BK) * triton.cdiv(V, BV)
    warps = min(8 if BK * BV > 4096 or (delta and not half) else 4, device.max_warps)
    stages = 1 if device.hip or not half else 3 if BK <= 128 else 2
    return Grid(programs, {**tile, "BK": BK, "BV": BV, "DELTA": delta, "STAGES": stages}, warps, stages)


def step_grid(B: int, Hv: int, K: int, V: int, kind: int, hip: bool) -> Grid:
    """The launch of a step: 2048 numbers of the state a program."""
    BK = max(16, triton.next_power_of_2(K))
    BV = min(2048 // BK, max(8, triton.next_power_of_2(V)))
    warps = (8 if BK > 64 else 4) // (2 if hip else 1)
    return Grid(B * Hv * triton.cdiv(V, BV), {"BK": BK, "BV": BV, "DECAY": kind}, warps, 1)


def _power(size: int) -> int:
    """The least tile of tl.dot, a power of 2 from 16 on, that holds `size`."""
    return max(16, triton.next_power_of_2(size))


@cache
def device_of(device: torch.device) -> Device:
    """`device` as tiles see it. On compute capability 10 Triton before 3.8 lets products that feed each other race
    with more than 2 warps."""
    hip = torch.version.hip is not None
    blackwell = device.type == "cuda" and not hip and torch.cuda.get_device_capability(device)[0] >= 10
    return Device(multiprocessors(device), hip, max_warps(blackwell, triton.__version__))


def max_warps(blackwell: bool, version: str) -> int:
    return 2 if blackwell and tuple(map(int, version.split(".")[:2])) < (3, 8) else 8


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor | None,
    decay: torch.Tensor | None,
    scale: float,
    initial_state: torch.Tensor | None,
    l2_norm: bool,
    bounds: torch.Tensor | None,
    *,
    delta: bool,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole sequences. Arguments and results as in the operators' references, without a normaliser.

    Args:
        beta: [B, T, Hv]; for linear attention None, or weights: S_t = exp(decay_t) S_{t-1} + beta_t k_t v_t^T.
        bounds: None, or where packed sequences begin and end, on the device of q. Where they do not rise from 0 to T
            the outputs and the states are NaN.
        delta: the delta rule, not linear attention.
        out_dtype: of the outputs, that of v where it is None.
    """
    _check_width(q)
    (B, T, H, K), (Hv, V), kind, packed = q.shape, v.shape[2:], _kind(decay), bounds is not None
    N, T = (bounds.numel() - 1, T) if packed else (B, T)
    if decay is None:
        decay = torch.zeros(Hv, device=q.device)
    (q, q_stride), (k, k_stride), (v, v_stride), (beta, beta_stride) = (_rows(x) for x in (q, k, v, beta))
    decay, decay_stride = (decay.contiguous(), 0) if decay.dim() == 1 else _rows(decay)
    initial = None if initial_state is None else initial_state.contiguous()
    grid = grids(N, T, Hv, K, V, q.dtype, kind, delta, packed, device_of(q.device))
    C, wide = chunk(K, q.dtype), buffer_dtype(q.dtype)
    S = slots(N, T, C, packed)

    def buffer(*shape, dtype=wide):
        return torch.empty(shape, dtype=dtype, device=q.device)

    o = buffer(*v.shape, dtype=out_dtype or v.dtype)
    final = buffer(N, Hv, K, V, dtype=torch.float32)
    states = buffer(S, Hv, K, V)
    until = weight = pairs = written = w = None
    # What the scan reads as keys, and the outputs as queries: as they are, or decayed by component for each head of v.
    read, read_stride, keys, keys_stride, heads = q, q_stride, k, k_stride, H
    values, values_stride = v, v_stride
    use_beta = beta is not None and not delta
    with torch.cuda.device_of(q):
        if kind == VECTOR:
            lost, pairs = buffer(S, Hv, K, dtype=torch.float32), buffer(S, Hv, C, C)
            read, keys = buffer(B, T, Hv, K), buffer(B, T, Hv, K)
            since = buffer(B, T, Hv, K) if delta else None
            products = buffer(S, Hv, C, C, dtype=torch.float32) if delta else None
            tokens = (q, k, decay, beta if use_beta else None, bounds)
            strides = (q_stride, k_stride, decay_stride, beta_stride)
            pairs_kernel[(grid["pairs"].programs,)](
                *(pairs, products, read, since, keys, lost, *tokens),
                *(T, N, H, Hv, K, *strides),
                **grid["pairs"].options(),
                UNIT=l2_norm,
                USE_BETA=use_beta,
            )
            read_stride = keys_stride = Hv * K
            heads, l2_norm = Hv, False
        else:
            lost, until = buffer(S, Hv, dtype=torch.float32), buffer(B, T, Hv, dtype=torch.float32)
        if delta:
            values, written, w = buffer(B, T, Hv, V), buffer(B, T, Hv, V), buffer(B, T, Hv, K)
            if l2_norm:
                weight = buffer(B, T, Hv, dtype=torch.float32)
            own, own_stride = (since, Hv * K) if kind == VECTOR else (k, k_stride)
            corrections_kernel[(grid["corrections"].programs,)](
                *(values, w, until, weight, lost, own, v, products if kind == VECTOR else None, beta, decay, bounds),
                *(T, N, heads, Hv, K, V, own_stride, v_stride, beta_stride, decay_stride),
                **grid["corrections"].options(),
                UNIT=l2_norm,
            )
            values_stride, weight_stride = Hv * V, Hv
        else:
            weight, weight_stride = beta, beta_stride
            if kind == SCALAR:
                weights_kernel[(grid["weights"].programs,)](
                    *(until, lost, decay, beta, bounds, T, N, Hv, decay_stride, beta_stride),
                    **grid["weights"].options(),
                    USE_BETA=use_beta,
                )
        states_kernel[(grid["states"].programs,)](
            *(states, final, written, keys, values, w, until, lost, initial, bounds),
            *(T, N, heads, Hv, K, V, keys_stride, values_stride),
            **grid["states"].options(),
            USE_INITIAL=initial is not None,
        )
        outputs_kernel[(grid["outputs"].programs,)](
            *(o, read, k, written if delta else v, states, pairs, decay, weight, bounds, scale),
            *(T, N, heads, Hv, K, V, read_stride, k_stride, values_stride, decay_stride, weight_stride),
            **grid["outputs"].options(),
            UNIT=l2_norm,
            WEIGHTED=weight is not None and kind == SCALAR,
        )
    return o, final


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor | None,
    state: torch.Tensor,
    decay: torch.Tensor | None,
    scale: float,
    l2_norm: bool,
    *,
    delta: bool,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """A few tokens that continue `state`, which is updated in place. Arguments as in `launch`."""
    _check_width(q)
    (B, T, H, K), (Hv, V) = q.shape, v.shape[2:]
    (q, q_stride), (k, k_stride), (v, v_stride), (beta, beta_stride) = (_rows(x) for x in (q, k, v, beta))
    kind = NONE if decay is None else _kind(decay)
    if decay is None or decay.dim() == 1:
        decay_stride, decay = 0, None if decay is None else decay.contiguous()
    else:
        decay, decay_stride = _rows(decay)
    o = torch.empty(v.shape, dtype=out_dtype or v.dtype, device=v.device)
    grid = step_grid(B, Hv, K, V, kind, device_of(q.device).hip)
    with torch.cuda.device_of(q):
        step_kernel[(grid.programs,)](
            *(o, q, k, v, beta, decay, state, scale),
            *(T, H, Hv, K, V, q_stride, k_stride, v_stride, beta_stride, decay_stride, *state.stride()),
            **grid.options(),
            DELTA=delta,
            UNIT=l2_norm,
            USE_BETA=beta is not None,
        )
    return o


def _check_width(q: torch.Tensor) -> None:
    if q.shape[3] > MAX_K:
        raise ValueError(f"q: expected K of at most {MAX_K} on a GPU, got K = {q.shape[3]}")


def _kind(decay: torch.Tensor | None) -> int:
    return VECTOR if decay is not None and decay.dim() == 4 else SCALAR


def _rows(x: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
    """x [B, T, ...] and the elements between its tokens: as it is where those of all rows lie at one distance and each
    is contiguous in itself (parts of a fused projection are), else copied."""
    if x is None:
        return None, 0
    B, T = x.shape[:2]
    token = x[0, 0]
    one_distance = B == 1 or T == 1 or x.stride(0) == T * x.stride(1)
    if not (one_distance and token.is_contiguous()):
        x = x.contiguous()
    return x, x.stride(1) if T > 1 else x.stride(0)
