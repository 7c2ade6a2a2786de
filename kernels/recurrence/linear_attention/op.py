"""Causal linear attention with decay: chunks of tokens for prefill, a step that updates its state in place for decode.

Lightning attention / TransNormerLLM (Qin et al. 2024, arXiv 2405.17381), MiniMax-01, RetNet (2307.08621), Mamba-2
(2405.21060), GLA (2312.06635) and HGRN2 (2404.07904) differ only in the decay and in what is done to q, k and v before.
"""

from functools import partial

import torch

from ... import backend, checks, sequence
from . import chunked, cpu, reference

_library = torch.library.Library("hasten", "FRAGMENT")
_library.define(
    "linear_attention(Tensor q, Tensor k, Tensor v, Tensor? beta, Tensor? decay, float scale, Tensor? initial_state, "
    "bool normalize, bool reverse, Tensor? cu_seqlens, ScalarType? out_dtype) -> (Tensor, Tensor)"
)
_library.define(
    "linear_attention_step(Tensor q, Tensor k, Tensor v, Tensor? beta, Tensor(a!) state, Tensor? decay, float scale, "
    "bool normalize) -> Tensor"
)


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    beta: torch.Tensor | None = None,
    decay: torch.Tensor | None = None,
    scale: float = 1.0,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
    normalize: bool = False,
    reverse: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """q, k [B, T, H, K], v [B, T, Hv, V] -> o [B, T, Hv, V], and the final state if `return_state`.

    S_t = Diag(exp(decay_t)) S_{t-1} + beta_t k_t v_t^T and o_t = scale * S_t^T q_t, with the state S [K, V] in float32
    whatever the inputs are. Products of bfloat16 inputs are multiplied in bfloat16 where the hardware can, and summed
    in float32: weights, decayed keys and the state that a chunk reads are rounded once;
    what is carried from chunk to chunk is not.

    Args:
        q, k, v: float32, float16 or bfloat16 (float64 runs in plain torch). Hv is a multiple of H;
            head h of v reads head h * H // Hv of q and k.
        beta: [B, T, Hv], how strongly each token is written (Mamba-2's time step, the input gate of mLSTM), of any
            floating dtype; None for 1.
        decay: logarithms <= 0, of any floating dtype: None (no decay), [Hv] (one per head: lightning attention,
            RetNet), [B, T, Hv] (Mamba-2) or [B, T, Hv, K] (GLA, HGRN2). -inf forgets everything.
        scale: of the outputs. 1, not K ** -0.5, is the default.
        initial_state: [N, Hv, K, V] float32, where N is B, or the number of packed sequences; not changed.
        return_state: also return the final state, of the shape of `initial_state`.
        normalize: divide o_t by q_t . z_t + 1e-6 with z_t = exp(decay_t) z_{t-1} + beta_t k_t. The state is then
            [N, Hv, K, V + 1], z its last column.
        reverse: from the last token to the first, as if every input were flipped along T.
        cu_seqlens: int32 or int64 [N + 1], rising from 0 to T: where packed sequences begin and end. B is 1 then.
        out_dtype: of o: torch.float32 keeps the sums of halves unrounded. None for the dtype of v.

    Raises:
        TypeError: dtypes that do not fit, or a scale that is no number.
        ValueError: shapes or devices that do not fit, a scale that is not finite, T = 0, or a positive decay (on a CPU;
            on a GPU such a sequence becomes NaN).
        NotImplementedError: an input that requires grad: the kernels have no gradients,
            `hasten.kernels.backend.use("reference")` has.
    """
    tensors = {"q": q, "k": k, "v": v, "decay": decay, "initial_state": initial_state, "cu_seqlens": cu_seqlens}
    tensors |= {} if beta is None else {"beta": beta}
    checks.check_tensors(**tensors)
    checks.check_number("scale", scale)
    if backend.is_reference():
        o, state = _run(q, k, v, beta, decay, scale, initial_state, normalize, reverse, cu_seqlens, out_dtype)
    else:
        checks.refuse_gradients(**tensors)
        o, state = _op(q, k, v, beta, decay, scale, initial_state, normalize, reverse, cu_seqlens, out_dtype)
    return (o, state) if return_state else o


def linear_attention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    *,
    beta: torch.Tensor | None = None,
    decay: torch.Tensor | None = None,
    scale: float = 1.0,
    normalize: bool = False,
) -> torch.Tensor:
    """The same for a few tokens that continue `state`, token by token: decode. `state`
    [B, Hv, K, V (+ 1)] is updated in place.

    Arguments, shapes ([B, T, H, K] with T = 1 in decode) and errors as in `linear_attention`.
    """
    tensors = {"q": q, "k": k, "v": v, "decay": decay, "state": state} | ({} if beta is None else {"beta": beta})
    checks.check_tensors(**tensors)
    checks.check_number("scale", scale)
    checks.refuse_gradients(checks.IN_PLACE, **tensors)
    return _step_op(q, k, v, beta, state, decay, scale, normalize)


def _check(q, k, v, beta, decay, state, normalize, cu_seqlens=None, name="initial_state"):
    sequence.check_heads(q, k, v)
    if beta is not None:
        sequence.check_beta(q, v, beta)
    sequence.check_decay(q, v, decay)
    sequence.check_packing(q, cu_seqlens)
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    sequence.check_state(q, name, state, [N, v.shape[2], q.shape[3], v.shape[3] + normalize])


def _check_out_dtype(q, out_dtype):
    if out_dtype not in (None, q.dtype, sequence.state_dtype(q)):
        raise TypeError(f"out_dtype: expected {q.dtype}, {sequence.state_dtype(q)} or None, got {out_dtype}")


def _run(q, k, v, beta, decay, scale, initial_state, normalize, reverse, cu_seqlens, out_dtype):
    _check(q, k, v, beta, decay, initial_state, normalize, cu_seqlens)
    _check_out_dtype(q, out_dtype)
    name = backend.choose(q, "chunked")
    if name != "cpu":  # whose kernel looks
        sequence.check_signs(decay)
    bounds = sequence.bounds(cu_seqlens, q, name == "triton")
    if reverse:
        q, k, v, beta = (None if x is None else x.flip(1) for x in (q, k, v, beta))
        decay = decay if decay is None or decay.dim() == 1 else decay.flip(1)
        if bounds is not None:
            bounds = sequence.reversed_bounds(bounds, q.shape[1])
            initial_state = None if initial_state is None else initial_state.flip(0)
    forms = {"reference": reference.linear_attention, "chunked": _chunked, "cpu": cpu.launch, "triton": _triton}
    o, state = forms[name](q, k, v, beta, decay, scale, initial_state, normalize, bounds, out_dtype)
    if reverse:
        o = o.flip(1)
        state = state if bounds is None else state.flip(0)
    return o, state


def _chunked(q, k, v, beta, decay, scale, initial_state, normalize, bounds, out_dtype):
    alone = partial(chunked.linear_attention, scale=1.0)
    values = _with_ones(v, normalize).to(sequence.state_dtype(v))
    values = values if beta is None else values * beta.to(values.dtype)[..., None]
    o, state = sequence.per_sequence(alone, (q, k, values), decay, initial_state, bounds)
    return _read(o, scale, normalize, out_dtype or v.dtype), state


def _triton(q, k, v, beta, decay, scale, initial_state, normalize, bounds, out_dtype):
    from .. import triton

    values, wide = _with_ones(v, normalize), torch.float32 if normalize else out_dtype
    factor = 1.0 if normalize else scale
    settings = {"delta": False, "out_dtype": wide}
    o, state = triton.launch(q, k, values, beta, decay, factor, initial_state, False, bounds, **settings)
    return _read(o, scale, True, out_dtype or v.dtype) if normalize else o, state


def _with_ones(v, normalize):
    """v, with the column of ones that makes the normaliser."""
    return torch.cat([v, v.new_ones(*v.shape[:3], 1)], -1) if normalize else v


def _read(o, scale, normalize, dtype):
    """o in `dtype`, scaled, and divided by its last column if that is the normaliser."""
    o = o[..., :-1] / (o[..., -1:] + reference.EPSILON) if normalize else o
    return (scale * o).to(dtype)


def _run_step(q, k, v, beta, state, decay, scale, normalize):
    _check(q, k, v, beta, decay, state, normalize, name="state")
    checks.check_writable("state", state)
    sequence.check_signs(decay)
    name = backend.choose(q)
    if name == "reference":
        o, new = reference.linear_attention(q, k, v, beta, decay, scale, state, normalize, None)
        state.copy_(new)
        return o
    if name == "cpu":
        return cpu.step(q, k, v, beta, state, decay, scale, normalize)
    from .. import triton

    values, wide = _with_ones(v, normalize), torch.float32 if normalize else None
    factor = 1.0 if normalize else scale
    o = triton.step(q, k, values, beta, state, decay, factor, False, delta=False, out_dtype=wide)
    return _read(o, scale, True, v.dtype) if normalize else o


def _fake(q, k, v, beta, decay, scale, initial_state, normalize, reverse, cu_seqlens, out_dtype):
    _check(q, k, v, beta, decay, initial_state, normalize, cu_seqlens)
    _check_out_dtype(q, out_dtype)
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = q.new_empty(N, v.shape[2], q.shape[3], v.shape[3] + normalize, dtype=sequence.state_dtype(q))
    return torch.empty_like(v, dtype=out_dtype, memory_format=torch.contiguous_format), state


def _fake_step(q, k, v, beta, state, decay, scale, normalize):
    _check(q, k, v, beta, decay, state, normalize, name="state")
    return torch.empty_like(v, memory_format=torch.contiguous_format)


_library.impl("linear_attention", _run, "CompositeExplicitAutograd")
_library.impl("linear_attention_step", _run_step, "CompositeExplicitAutograd")
torch.library.register_fake("hasten::linear_attention", _fake, lib=_library)
torch.library.register_fake("hasten::linear_attention_step", _fake_step, lib=_library)
_op = torch.ops.hasten.linear_attention.default
_step_op = torch.ops.hasten.linear_attention_step.default
