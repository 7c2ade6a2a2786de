"""The forward of MiniMax' lightning attention, whose loops stand in the forward itself, and what its cache lacks.

A `MiniMaxCache` keeps the states of lightning attention in a list of its own, beside the entries of full attention,
which are made as they are written. Where the first layer is lightning attention, as in every released model, entry 0
stays empty, and with it the count of tokens: transformers' next call takes its positions and masks to begin at 0. Nor
does beam search reorder those states. An entry of the right kind mends both.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import LinearAttentionLayer

from hasten.acceleration.techniques.adapted_forwards import check_state, refuse_others
from hasten.kernels.recurrence.linear_attention import linear_attention, linear_attention_step
from hasten.kernels.sequence import state_dtype


class LightningEntry(LinearAttentionLayer):
    """The entry of layer `layer_idx` among those of a `MiniMaxCache`, whose states it knows.

    Tokens are counted where an entry is not of linear attention: transformers passes over this one.
    """

    def __init__(self, states: list[torch.Tensor], layer_idx: int):
        super().__init__()
        self.states, self.layer_idx = states, layer_idx

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        state = self.states[self.layer_idx]
        self.states[self.layer_idx] = state.index_select(0, beam_idx.to(state.device))

    def reset(self) -> None:
        self.states[self.layer_idx] = []  # as the cache has it for layers without a state


def minimax_forward(layer: nn.Module) -> Callable:
    """The forward of a `MiniMaxLightningAttention`: its state in float32, and a cached prefix continued in chunks."""
    slopes = layer.get_slope_rate().detach().float().flatten()

    def forward(self, hidden_states, position_embeddings, attention_mask, past_key_values=None, **others):
        refuse_others(others)
        B, T, _ = hidden_states.shape
        qkv = self.act_fn(self.qkv_proj(hidden_states))
        if attention_mask is not None:
            qkv = (qkv * attention_mask[:, :, None]).to(qkv.dtype)
        q, k, v = qkv.view(B, T, self.num_attention_heads, 3 * self.head_dim).split(self.head_dim, dim=3)
        decay = -slopes.to(q.device)
        state = None if past_key_values is None else _state(past_key_values, self.layer_idx)
        if state is not None:
            check_state("state of lightning attention", state, [B, self.num_attention_heads, *[self.head_dim] * 2])
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


def _state(cache, layer_idx: int) -> torch.Tensor | None:
    """The state that a `MiniMaxCache` has for a layer, whose entry it gets with the first.

    Raises:
        ValueError: transformers' own layers filled the cache, so that this call took its positions and masks to begin
            at 0.
    """
    state = cache.get_linear_cache(layer_idx)
    layers = cache.layers
    while len(layers) <= layer_idx:
        layers.append(cache.layer_class_to_replicate())
    if isinstance(state, torch.Tensor) and not isinstance(layers[0], LightningEntry) and not cache.get_seq_length():
        raise ValueError(
            "past_key_values: expected a cache that this accelerated model filled, got one that transformers' own "
            "layers filled: it counts 0 tokens, so that positions and masks would begin anew. Pass the whole text again"
        )
    if not isinstance(layers[layer_idx], LightningEntry):
        layers[layer_idx] = LightningEntry(cache.linear_cache, layer_idx)
    return state if isinstance(state, torch.Tensor) else None
