"""The forward of MiniMax' lightning attention, whose loops stand in the forward itself."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import nn

from hasten.acceleration.techniques.adapted_forwards import refuse_others
from hasten.kernels.recurrence.linear_attention import linear_attention, linear_attention_step
from hasten.kernels.sequence import state_dtype


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
