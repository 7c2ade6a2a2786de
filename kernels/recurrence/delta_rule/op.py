"""The delta rule with decay: linear attention whose state corrects what it predicts for a key instead of adding to it.

DeltaNet (Yang et al. 2024, arXiv 2406.06484), Gated DeltaNet (2412.06464; Qwen3-Next, OLMo-hybrid) and Kimi Delta
Attention (2510.26692) differ only in the decay.
"""

from functools import partial

import torch

from ... import backend, checks, sequence
from . import chunked, cpu, reference

_library = torch.library.Library("hasten", "FRAGMENT")
_library.define(
    "delta_rule(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? decay, float scale, "
    "Tensor? initial_state, bool l2_norm, Tensor? cu_seqlens) -> (Tensor, Tensor)"
)
_library.define(
    "delta_rule_step(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor(a!) state, Tensor? decay, "
    "float scale, bool l2_norm)"
    " -> Tensor"
)


def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    *,
    decay: torch.Tensor | None = None,
    scale: float = 1.0,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
    l2_norm: bool = False,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """q, k [B, T, H, K], v [B, T, Hv, V], beta [B, T, Hv] -> o [B, T, Hv, V], and the final state if `return_state`.

    S~ = Diag(exp(decay_t)) S_{t-1}, S_t = S~ + k_t (beta_t (v_t - S~^T k_t))^T and o_t = scale * S_t^T q_t,
    with the state S [K, V] in float32.

    Args:
        q, k, v: float32, float16 or bfloat16 (float64 runs in plain torch). Hv is a multiple of H;
            head h of v reads head h * H // Hv of q and k.
        beta: how much of its error a token corrects, of any floating dtype; usually in [0, 1], or [0, 2].
        decay: logarithms <= 0, of any floating dtype: None (DeltaNet), [Hv], [B, T, Hv] (Gated DeltaNet) or
            [B, T, Hv, K] (Kimi Delta Attention).
        scale: of the outputs. 1 is the default; the models above use K ** -0.5.
        initial_state: [N, Hv, K, V] float32, where N is B, or the number of packed sequences; not changed.
        return_state: also return the final state, [N, Hv, K, V].
        l2_norm: use q / sqrt(q . q + 1e-6) and the same of k. Without it keys should not be longer than 1:
            the recurrence may grow.
        cu_seqlens: int32 or int64 [N + 1], rising from 0 to T: where packed sequences begin and end. B is 1 then.

    Raises:
        TypeError, ValueError, NotImplementedError: as `hasten.kernels.recurrence.linear_attention.linear_attention`.
    """
    tensors = {"q": q, "k": k, "v": v, "beta": beta, "decay": decay, "initial_state": initial_state}
    tensors["cu_seqlens"] = cu_seqlens
    checks.check_tensors(**tensors)
    checks.check_number("scale", scale)
    if backend.is_reference():
        o, state = _run(q, k, v, beta, decay, scale, initial_state, l2_norm, cu_seqlens)
    else:
        checks.refuse_gradients(**tensors)
        o, state = _op(q, k, v, beta, decay, scale, initial_state, l2_norm, cu_seqlens)
    return (o, state) if return_state else o


def delta_rule_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    *,
    decay: torch.Tensor | None = None,
    scale: float = 1.0,
    l2_norm: bool = False,
) -> torch.Tensor:
    """The same for a few tokens that continue `state`, token by token: decode. `state` [B, Hv, K, V] is
    updated in place.

    Arguments, shapes ([B, T, H, K] with T = 1 in decode) and errors as in `delta_rule`.
    """
    tensors = {"q": q, "k": k, "v": v, "beta": beta, "decay": decay, "state": state}
    checks.check_tensors(**tensors)
    checks.check_number("scale", scale)
    checks.refuse_gradients(checks.IN_PLACE, **tensors)
    return _step_op(q, k, v, beta, state, decay, scale, l2_norm)


def _check(q, k, v, beta, decay, state, cu_seqlens=None, name="initial_state"):
    sequence.check_heads(q, k, v)
    sequence.check_beta(q, v, beta)
    sequence.check_decay(q, v, decay)
    sequence.check_packing(q, cu_seqlens)
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sequence.check_state(q, name, state, [N, v.shape[2], q.shape[3], v.shape[3]])


def _run(q, k, v, beta, decay, scale, initial_state, l2_norm, cu_seqlens):
    _check(q, k, v, beta, decay, initial_state, cu_seqlens)
    name = backend.choose(q, "chunked")
    if name != "cpu":  # whose kernel looks
        sequence.check_signs(decay)
    bounds = sequence.bounds(cu_seqlens, q, name == "triton")
    implementation = {"reference": reference.delta_rule, "chunked": _chunked, "cpu": _cpu, "triton": _triton}[name]
    return implementation(q, k, v, beta, decay, scale, initial_state, l2_norm, bounds)


def _chunked(q, k, v, beta, decay, scale, initial_state, l2_norm, bounds):
    alone = partial(chunked.delta_rule, scale=scale, l2_norm=l2_norm)
    return sequence.per_sequence(alone, (q, k, v, beta), decay, initial_state, bounds)


def _cpu(q, k, v, beta, decay, scale, initial_state, l2_norm, bounds):
    return cpu.launch(q, k, v, beta, decay, scale, initial_state, l2_norm, bounds)


def _triton(q, k, v, beta, decay, scale, initial_state, l2_norm, bounds):
    from .. import triton

    return triton.launch(q, k, v, beta, decay, scale, initial_state, l2_norm, bounds, delta=True)


def _run_step(q, k, v, beta, state, decay, scale, l2_norm):
    _check(q, k, v, beta, decay, state, name="state")
    checks.check_writable("state", state)
    sequence.check_signs(decay)
    name = backend.choose(q)
    if name == "reference":
        o, new = reference.delta_rule(q, k, v, beta, decay, scale, state, l2_norm, None)
        state.copy_(new)
        return o
    if name == "triton":
        from .. import triton

        return triton.step(q, k, v, beta, state, decay, scale, l2_norm, delta=True)
    return cpu.step(q, k, v, beta, state, decay, scale, l2_norm)


def _fake(q, k, v, beta, decay, scale, initial_state, l2_norm, cu_seqlens):
    _check(q, k, v, beta, decay, initial_state, cu_seqlens)
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = q.new_empty(N, v.shape[2], q.shape[3], v.shape[3], dtype=sequence.state_dtype(q))
    return torch.empty_like(v, memory_format=torch.contiguous_format), state


def _fake_step(q, k, v, beta, state, decay, scale, l2_norm):
    _check(q, k, v, beta, decay, state, name="state")
    return torch.empty_like(v, memory_format=torch.contiguous_format)


_library.impl("delta_rule", _run, "CompositeExplicitAutograd")
_library.impl("delta_rule_step", _run_step, "CompositeExplicitAutograd")
torch.library.register_fake("hasten::delta_rule", _fake, lib=_library)
torch.library.register_fake("hasten::delta_rule_step", _fake_step, lib=_library)
_op = torch.ops.hasten.delta_rule.default
_step_op = torch.ops.hasten.delta_rule_step.default
