"""The linear-attention layers of transformers models, and what hasten puts in the place of their torch fallbacks.

A layer keeps transformers' own forward, re-made for this instance with the slow functions that it calls replaced:
everything in which the families differ (projections, gates, norms, caches) stays theirs. MiniMax, whose loops stand in
the forward itself, gets a forward of ours.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import nn

from hasten.kernels.causal_conv1d import causal_conv1d, causal_conv1d_update
from hasten.kernels.recurrence.delta_rule import delta_rule, delta_rule_step
from hasten.kernels.recurrence.linear_attention import linear_attention, linear_attention_step
from hasten.kernels.sequence import state_dtype

# Adapters: the names, arguments and side effects of the functions that they replace. Layers pass along what their model
# was called with; what is neither an argument here nor in IGNORED must be None, for it is not computed.
IGNORED = (
    *("use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "num_items_in_batch"),
    *("position_ids", "position_embeddings"),
)
PACKED = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


def chunk_delta_rule(
    query,
    key,
    value,
    g,
    beta,
    chunk_size=64,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    **others,
):
    """For `torch_chunk_gated_delta_rule` and `chunk_kimi_delta_attention`; chunks are ours."""
    _refuse_others(others)
    state = None if initial_state is None else initial_state.to(state_dtype(query))
    settings = {"decay": g, "scale": query.shape[-1] ** -0.5, "l2_norm": use_qk_l2norm_in_kernel}
    output, state = delta_rule(query, key, value, beta, initial_state=state, return_state=True, **settings)
    return output, state if output_final_state else None


def step_delta_rule(
    query,
    key,
    value,
    g,
    beta,
    initial_state,
    output_final_state,
    use_qk_l2norm_in_kernel=False,
    **others,
):
    """For `torch_recurrent_gated_delta_rule` and `recurrent_kimi_delta_attention`.
    A cached state of the right dtype is updated in place."""
    _refuse_others(others)
    if initial_state is None:
        return chunk_delta_rule(
            query,
            key,
            value,
            g,
            beta,
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        )
    state = initial_state.to(state_dtype(query))
    settings = {"decay": g, "scale": query.shape[-1] ** -0.5, "l2_norm": use_qk_l2norm_in_kernel}
    output = delta_rule_step(query, key, value, beta, state, **settings)
    return output, state if output_final_state else None


def chunk_mamba2(
    hidden_states,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    dt_bias=None,
    initial_states=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    **others,
):
    """For `mamba2_chunk_scan`: k = B, v = dt x, q = C, decay = dt A. The state [K, V] is transformers'
    [head_dim, state_size], transposed."""
    _refuse_others(others)
    dt = _time_step(dt, dt_bias, dt_softplus).clamp(*dt_limit)
    x = hidden_states.float()
    state = None if initial_states is None else initial_states.float().transpose(-1, -2)
    output, state = linear_attention(
        C.float(), B.float(), x * dt[..., None], decay=dt * A.float(), initial_state=state, return_state=True
    )
    if D is not None:
        output = output + D.float()[:, None] * x
    return (output, state.transpose(-1, -2)) if return_final_states else output


def step_mamba2(
    state,
    hidden_states,
    dt,
    A,
    B,
    C,
    D=None,
    dt_bias=None,
    dt_softplus=False,
    z=None,
    **others,
):
    """For `mamba2_selective_state_update`: the state is updated in place.
    dt, A, D and their biases are the same for a whole head there."""
    _refuse_others(others)
    dt = _time_step(dt[..., 0], None if dt_bias is None else dt_bias[:, 0], dt_softplus)
    x = hidden_states.float()
    kept = state.float()
    output = linear_attention_step(
        C.float()[:, None],
        B.float()[:, None],
        (x * dt[..., None])[:, None],
        kept.transpose(-1, -2),
        decay=(dt * A[:, 0, 0].float())[:, None],
    )[:, 0]
    if kept is not state:
        state.copy_(kept)
    if D is not None:
        output = output + D[:, :1].float() * x
    return (output if z is None else output * F.silu(z)).to(hidden_states.dtype)


def conv1d(hidden_states, weight, bias=None, activation=None, **others):
    """For `causal_conv1d_fn`."""
    _refuse_others(others)
    return causal_conv1d(hidden_states, weight, bias, activation=activation)


def conv1d_update(hidden_states, conv_state, weight, bias=None, activation=None):
    """For `causal_conv1d_update`: the state is shifted in place."""
    return causal_conv1d_update(hidden_states, conv_state, weight, bias, activation=activation)


def minimax_forward(layer: nn.Module) -> Callable:
    """The forward of a `MiniMaxLightningAttention`: its state in float32, and a cached prefix continued in chunks."""
    slopes = layer.get_slope_rate().detach().float().flatten()

    def forward(self, hidden_states, position_embeddings, attention_mask, past_key_values=None, **others):
        _refuse_others(others)
        B, T, _ = hidden_states.shape
        qkv = self.act_fn(self.qkv_proj(hidden_states))
        if attention_mask is not None:
            qkv = (qkv * attention_mask[:, :, None]).to(qkv.dtype)
        q, k, v = qkv.view(B, T, self.num_attention_heads, 3 * self.head_dim).split(self.head_dim, dim=3)
        decay = -slopes.to(q.device)
        state = None if past_key_values is None else past_key_values.get_linear_cache(self.layer_idx)
        if state is not None:
            state = state.to(state_dtype(q))
        if state is not None and T == 1:
            output = linear_attention_step(q, k, v, state, decay=decay)
        else:
            output, state = linear_attention(q, k, v, decay=decay, initial_state=state, return_state=True)
        output = self.norm(output.reshape(B, T, self.num_attention_heads * self.head_dim))
        output = self.out_proj(F.sigmoid(self.output_gate(hidden_states)).mul_(output))
        if past_key_values is not None:
            past_key_values.set_linear_cache(self.layer_idx, state)
        return output, state

    return forward


def _time_step(dt, bias, softplus) -> torch.Tensor:
    dt = dt.float() if bias is None else dt.float() + bias.float()
    return F.softplus(dt) if softplus else dt


def _refuse_others(others: dict) -> None:
    for name, value in others.items():
        if value is None or name in IGNORED:
            continue
        if name in PACKED:
            reason = f"packed sequences ({name}) are not kept apart by this layer: pass them as rows of a batch"
            raise ValueError(reason)
        raise ValueError(f"hasten's kernel for this layer does not compute {name}, got {value!r}: revert the model")


def remade(**replacements: Callable) -> Callable[[nn.Module], Callable]:
    """Makes the forward of a layer anew, calling `replacements` instead of the functions of those names."""

    def make(layer: nn.Module) -> Callable:
        stock = inspect.unwrap(type(layer).forward)
        # Without a name for the module, torch.compile too reads these globals and not those of the module.
        scope = {name: value for name, value in stock.__globals__.items() if name != "__name__"} | replacements
        made = FunctionType(stock.__code__, scope, stock.__name__, stock.__defaults__, stock.__closure__)
        made.__kwdefaults__ = stock.__kwdefaults__
        return made

    return make


_CONV = {"causal_conv1d_fn": conv1d, "causal_conv1d_update": conv1d_update}
_GATED = _CONV | {"torch_chunk_gated_delta_rule": chunk_delta_rule, "torch_recurrent_gated_delta_rule": step_delta_rule}
_KIMI = _CONV | {"chunk_kimi_delta_attention": chunk_delta_rule, "recurrent_kimi_delta_attention": step_delta_rule}
_MAMBA2 = _CONV | {"mamba2_chunk_scan": chunk_mamba2, "mamba2_selective_state_update": step_mamba2}


@dataclass(frozen=True, slots=True)
class Layer:
    """A class of layers: the models that have it, what makes its fast forward,
    and which functions of its module that replaces."""

    models: str
    make: Callable[[nn.Module], Callable]
    replaced: tuple[str, ...] = ()


def _layers(replacements: dict[str, Callable], **models: str) -> dict[str, Layer]:
    return {name: Layer(model, remade(**replacements), tuple(replacements)) for name, model in models.items()}


# By the name of the class.
LAYERS: dict[str, Layer] = (
    {"MiniMaxLightningAttention": Layer("MiniMax", minimax_forward)}
    | _layers(
        _GATED,
        Qwen3NextGatedDeltaNet="Qwen3-Next",
        Qwen3_5GatedDeltaNet="Qwen3.5",
        Qwen3_5MoeGatedDeltaNet="Qwen3.5-MoE",
        OlmoHybridGatedDeltaNet="OLMo-hybrid",
    )
    | _layers(_KIMI, KimiLinearDeltaAttention="Kimi-Linear", BailingHybridDeltaAttention="Bailing-hybrid")
    | _layers(
        _MAMBA2,
        Mamba2Mixer="Mamba-2",
        BambaMixer="Bamba",
        FalconH1Mixer="Falcon-H1",
        GraniteMoeHybridMambaLayer="Granite-MoE-hybrid",
        NemotronHMamba2Mixer="Nemotron-H",
        Zamba2MambaMixer="Zamba2",
    )
)
