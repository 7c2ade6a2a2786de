"""The C signature that linear attention and the delta rule share, and their launchers."""

import torch

from .. import cpu, sequence, storage


class TokenStrides(cpu.Arguments):
    __slots__ = ()
    _fields_ = (("row", cpu.SIZE), ("token", cpu.SIZE), ("head", cpu.SIZE), ("component", cpu.SIZE))


class StateStrides(cpu.Arguments):
    __slots__ = ()
    _fields_ = (("row", cpu.SIZE), ("head", cpu.SIZE), ("k", cpu.SIZE), ("v", cpu.SIZE))


class Shape(cpu.Arguments):
    __slots__ = ()
    _fields_ = (
        ("N", cpu.SIZE),
        ("T", cpu.SIZE),
        ("H", cpu.SIZE),
        ("Hv", cpu.SIZE),
        ("K", cpu.SIZE),
        ("V", cpu.SIZE),
        ("q", TokenStrides),
        ("k", TokenStrides),
        ("v", TokenStrides),
        ("beta", TokenStrides),
        ("decay", TokenStrides),
        ("state", StateStrides),
    )


class RecurrenceArguments(cpu.Arguments):
    __slots__ = ()
    _fields_ = (
        ("dtype", cpu.FLAG),
        ("threads", cpu.FLAG),
        ("o", cpu.POINTER),
        ("q", cpu.POINTER),
        ("k", cpu.POINTER),
        ("v", cpu.POINTER),
        ("beta", cpu.POINTER),
        ("decay", cpu.POINTER),
        ("skip", cpu.POINTER),
        ("initial", cpu.POINTER),
        ("state", cpu.POINTER),
        ("bounds", cpu.POINTER),
        ("scale", cpu.REAL),
        ("unit", cpu.FLAG),
        ("normalize", cpu.FLAG),
        ("wide", cpu.FLAG),
        ("shape", Shape),
    )


def launch(
    kernel: cpu.Function,
    q,
    k,
    v,
    beta,
    decay,
    scale,
    initial_state,
    bounds,
    *,
    l2_norm: bool = False,
    normalize: bool = False,
    skip: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole sequences by a compiled kernel.

    q, k [B, T, H, K], v [B, T, Hv, V] -> o [B, T, Hv, V], of `out_dtype` (float32 or None, the dtype of v), and the
    final states [N, Hv, K, V], with a column more for the normaliser if `normalize`.

    Raises:
        ValueError: a positive decay. It is the kernel that looks, for another pass over decays takes as long.
    """
    if decay is not None and decay.dim() == 1:
        sequence.check_signs(decay)
    q, k, v, beta, log_decay = _readable(q, k, v, beta, decay)
    N = q.shape[0] if bounds is None else len(bounds) - 1
    initial = None if initial_state is None else initial_state.contiguous()
    packed = None if bounds is None else torch.tensor(bounds, device="cpu")
    o = v.new_empty(v.shape, dtype=out_dtype)
    storage.ask_for_huge_pages(o)
    final = q.new_empty(N, v.shape[2], q.shape[3], v.shape[3] + normalize, dtype=torch.float32)
    arguments = _arguments(o, q, k, v, beta, log_decay, scale, final, l2_norm, normalize)
    skip = None if skip is None else skip.float().contiguous()
    arguments.skip = cpu.address(skip)
    arguments.initial, arguments.bounds, arguments.shape.N = cpu.address(initial), cpu.address(packed), N
    try:
        kernel(arguments)
    except ValueError:
        sequence.check_signs(decay)
        raise
    return o, final


def step(
    kernel: cpu.Function,
    q,
    k,
    v,
    beta,
    state,
    decay,
    scale,
    *,
    l2_norm: bool = False,
    normalize: bool = False,
    skip: torch.Tensor | None = None,
) -> torch.Tensor:
    """A few tokens, as `launch`; `state` [B, Hv, K, V] is updated in place."""
    q, k, v, beta, decay = _readable(q, k, v, beta, decay)
    S = _steppable(state)
    o = v.new_empty(v.shape)
    arguments = _arguments(o, q, k, v, beta, decay, scale, S, l2_norm, normalize)
    skip = None if skip is None else skip.float().contiguous()
    arguments.skip = cpu.address(skip)
    kernel(arguments)
    if S is not state:
        state.copy_(S)
    return o


def _readable(q, k, v, beta, decay) -> tuple:
    """q, k and v with contiguous components or tokens; beta and decay, where there are any, in float32, decay with
    contiguous components if it has some."""
    q, k, v = (x if x.stride(1) == 1 else _components_contiguous(x) for x in (q, k, v))
    beta = None if beta is None else beta.float()
    if decay is not None:
        decay = decay.float()
        decay = _components_contiguous(decay) if decay.dim() == 4 else decay
    return q, k, v, beta, decay


def _components_contiguous(x: torch.Tensor) -> torch.Tensor:
    """x [..., D] itself if the last dimension is contiguous, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(x: torch.Tensor) -> tuple[int, ...]:
    """Of x [B, T, H, D]; that of a single component is 1, whatever torch says."""
    return (*x.stride()[:3], 1 if x.shape[3] == 1 else x.stride(3))


def _steppable(state: torch.Tensor) -> torch.Tensor:
    """state [B, Hv, K, V] itself if K or V is contiguous, else a copy in which V is."""
    return state if state.stride(3) == 1 or state.stride(2) == 1 else state.contiguous()


def _arguments(o, q, k, v, beta, decay, scale, state, unit, normalize) -> RecurrenceArguments:
    """For B sequences of T tokens that are not packed and begin with a state of zeros."""
    B, T, H, K = q.shape
    Hv, V = v.shape[2:]
    return RecurrenceArguments(
        dtype=storage.DTYPE_CODES[q.dtype],
        threads=torch.get_num_threads(),
        o=o.data_ptr(),
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        beta=cpu.address(beta),
        decay=cpu.address(decay),
        state=state.data_ptr(),
        scale=scale,
        unit=unit,
        normalize=normalize,
        wide=o.dtype != v.dtype,
        shape=Shape(
            N=B,
            T=T,
            H=H,
            Hv=Hv,
            K=K,
            V=V,
            q=_strides(q),
            k=_strides(k),
            v=_strides(v),
            beta=() if beta is None else beta.stride(),
            decay=_decay_strides(decay),
            state=state.stride(),
        ),
    )


def _decay_strides(decay: torch.Tensor | None) -> tuple[int, ...]:
    """One decay for all rows and tokens has strides of zero; so has one for all components.
    A single component needs no stride of its own."""
    if decay is None:
        return ()
    return (0, 0, decay.stride(0), 0) if decay.dim() == 1 else (*decay.stride()[:3], int(decay.dim() == 4))
