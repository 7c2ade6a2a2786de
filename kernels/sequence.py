"""What the operators over sequences share: their shapes, the kinds of decay, packed sequences, and the checks of both.

Letters: B rows of a batch, T tokens, H heads of q and k, Hv heads of v (a multiple of H; head h of v reads head h * H
// Hv of q and k), K and V the sizes of a head, N sequences (B, or the number of packed ones).
"""

from itertools import pairwise

import torch

from .checks import check_device, check_floating, check_like, check_shape


def state_dtype(q: torch.Tensor) -> torch.dtype:
    """The dtype that a state is kept in: float32, or float64 for float64 inputs."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def check_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raises unless q, k [B, T, H, K] and v [B, T, Hv, V] fit, T >= 1,
    in one floating dtype on one device (see `checks`)."""
    if q.dim() != 4:
        raise ValueError(f"q: expected shape [B, T, H, K], got shape {list(q.shape)}")
    check_floating("q", q)
    B, T, H, K = q.shape
    if T == 0:
        raise ValueError(f"q: expected at least one token, got T = 0 in shape {list(q.shape)}")
    if B == 0 or H == 0 or K == 0:
        raise ValueError(f"q: expected B, H and K of at least 1, got shape {list(q.shape)}")
    if k.shape != q.shape:
        raise ValueError(f"k: expected {list(q.shape)}, the shape of q, got shape {list(k.shape)}")
    if v.dim() != 4 or v.shape[:2] != q.shape[:2] or v.shape[3] == 0:
        raise ValueError(
            f"v: expected shape [{B}, {T}, Hv, V] for q of shape {list(q.shape)}, got shape {list(v.shape)}"
        )
    if v.shape[2] == 0 or v.shape[2] % H:
        raise ValueError(f"v: expected a multiple of the {H} heads of q and k, got {v.shape[2]} heads")
    check_like(q, "k", k, "q")
    check_like(q, "v", v, "q")


def check_decay(q: torch.Tensor, v: torch.Tensor, decay: torch.Tensor | None) -> None:
    """Raises unless decay is None, [Hv], [B, T, Hv] or [B, T, Hv, K], floating, on the device of q."""
    if decay is None:
        return
    B, T, _, K = q.shape
    Hv = v.shape[2]
    check_shape("decay", decay, [Hv], [B, T, Hv], [B, T, Hv, K])
    check_floating("decay", decay)
    check_device(q, "decay", decay, "q")


def check_beta(q: torch.Tensor, v: torch.Tensor, beta: torch.Tensor) -> None:
    """Raises unless beta is [B, T, Hv], floating, on the device of q."""
    check_shape("beta", beta, list(v.shape[:3]))
    check_floating("beta", beta)
    check_device(q, "beta", beta, "q")


def check_signs(decay: torch.Tensor | None) -> None:
    """Raises ValueError where a decay on a CPU is positive. On a GPU looking would wait for the device: there a
    positive decay makes its output NaN."""
    if decay is None or not decay.is_cpu:
        return
    if bool((decay > 0).any()):
        largest = float(decay[decay > 0].max())
        raise ValueError(f"decay: expected logarithms of at most 0, got {largest:.4g}")


def check_state(q: torch.Tensor, name: str, state: torch.Tensor | None, shape: list[int]) -> None:
    """Raises unless state is None, or has this shape, the state's dtype and the device of q."""
    if state is None:
        return
    check_shape(name, state, shape)
    if state.dtype != state_dtype(q):
        raise TypeError(f"{name}: expected {state_dtype(q)}, got {state.dtype}")
    check_device(q, name, state, "q")


def check_packing(x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> None:
    """Raises unless cu_seqlens is None, or [N + 1] integers, with B = 1 in x [B, ...]."""
    if cu_seqlens is None:
        return
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: expected torch.int32 or torch.int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens: expected shape [N + 1], got shape {list(cu_seqlens.shape)}")
    if x.shape[0] != 1:
        raise ValueError(f"cu_seqlens: expected B = 1 (sequences packed along T), got B = {x.shape[0]}")


def boundaries(cu_seqlens: torch.Tensor, T: int) -> list[int]:
    """The values of cu_seqlens. Raises ValueError unless they rise from 0 to T."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != T or any(end <= begin for begin, end in pairwise(bounds)):
        raise ValueError(f"cu_seqlens: expected to rise from 0 to T = {T}, got {bounds}")
    return bounds


def bounds(cu_seqlens: torch.Tensor | None, q: torch.Tensor, on_device: bool) -> list[int] | torch.Tensor | None:
    """cu_seqlens as an implementation takes them: as a list, or as a tensor `on_device` of q for kernels that read them
    themselves. Only then values on a GPU are not looked at, which would wait for it."""
    if cu_seqlens is None:
        return None
    if on_device and not cu_seqlens.is_cpu:
        return cu_seqlens.contiguous()
    values = boundaries(cu_seqlens, q.shape[1])
    return cu_seqlens.contiguous().to(q.device) if on_device else values


def reversed_bounds(bounds: list[int] | torch.Tensor, T: int) -> list[int] | torch.Tensor:
    """The bounds of the same sequences from the last token to the first."""
    return [T - bound for bound in reversed(bounds)] if isinstance(bounds, list) else T - bounds.flip(0)


def per_sequence(form, tensors, decay, initial_state, bounds) -> tuple[torch.Tensor, torch.Tensor]:
    """form(*tensors, decay=, initial_state=) on each packed sequence alone;
    the outputs and the states of all of them."""
    if bounds is None:
        return form(*tensors, decay=decay, initial_state=initial_state)
    pieces = []
    for n, (begin, end) in enumerate(pairwise(bounds)):
        own_decay = decay if decay is None or decay.dim() == 1 else decay[:, begin:end]
        own_state = None if initial_state is None else initial_state[n : n + 1]
        own = [x[:, begin:end] for x in tensors]
        pieces.append(form(*own, decay=own_decay, initial_state=own_state))
    return torch.cat([o for o, _ in pieces], 1), torch.cat([state for _, state in pieces], 0)
