"""TransNormerLLM (Qin et al. 2024, arXiv 2405.17381): linear attention with decay, a state of constant size instead of
a cache of keys and values.

Letters: B rows, T tokens, C the embedding's width, H heads, K the size of a head of q and k (twice that of v in layers
with LRPE), V of v.
"""

import math
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from hasten.kernels import backend
from hasten.kernels.recurrence.linear_attention import linear_attention, linear_attention_step
from hasten.kernels.recurrence.linear_attention.features import lightning_decay, lrpe, lrpe_theta

from .cache import TransNormerCache
from .configuration import TransNormerConfig


def decays(heads: int, layers: int) -> torch.Tensor:
    """Logarithms of the decay [layers, H], float32, as the released checkpoints were trained."""
    return torch.stack([lightning_decay(heads, layer, layers) for layer in range(layers)])


class SimpleRMSNorm(nn.Module):
    """x / rms(x), without a weight, in float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Lrpe(nn.Module):
    """x [B, T, H, D] -> [x cos(theta t), x sin(theta t)] [B, T, H, 2 D] for positions t [B, T] (paper, section 3.1)."""

    def __init__(self, heads: int, size: int):
        super().__init__()
        self.theta = nn.Parameter(lrpe_theta(heads, size)[:, None])

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return lrpe(x, self.theta.squeeze(1), positions)


class TokenMixer(nn.Module):
    """out(norm(attention(silu(q), silu(k), v)) * u), the norm over all heads together."""

    def __init__(self, config: TransNormerConfig, layer: int):
        super().__init__()
        C, hidden, self.heads = config.decoder_embed_dim, config.hidden_dim, config.decoder_attention_heads
        self.layer = layer
        self.qkvu_proj = nn.Linear(C, 4 * hidden, bias=config.bias)
        self.out_proj = nn.Linear(hidden, C, bias=config.bias)
        self.norm = SimpleRMSNorm()
        self.lrpe = Lrpe(self.heads, hidden // self.heads) if config.uses_lrpe[layer] else None

    def forward(self, x, positions, mask, decay, cache: TransNormerCache | None):
        """x [B, T, C], positions [B, T], mask [B, T] of the tokens that count or None, decay [H] or [B, T, H]."""
        q, k, v, u = self.qkvu_proj(x).chunk(4, -1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (F.silu(q), F.silu(k), v))
        if mask is not None:
            k, v = k * mask[..., None, None], v * mask[..., None, None]
        if self.lrpe is not None:
            q, k = self.lrpe(q, positions), self.lrpe(k, positions)
        o = self.attend(q.contiguous(), k.contiguous(), v.contiguous(), decay, cache)
        return self.out_proj(self.norm(o.flatten(2)) * u)

    def attend(self, q, k, v, decay, cache):
        state = None if cache is None else cache.state(self.layer)
        differentiable = torch.is_grad_enabled() and any(y.requires_grad for y in (q, k, v))
        if state is not None and q.shape[1] == 1 and not differentiable:
            return linear_attention_step(q, k, v, state, decay=decay)
        with backend.use("reference") if differentiable else nullcontext():
            o, state = linear_attention(q, k, v, decay=decay, initial_state=state, return_state=True)
        if cache is not None:
            cache.keep(self.layer, state.detach())
        return o


class ChannelMixer(nn.Module):
    """l3(l1(x) * l2(x)): a gated layer without an activation."""

    def __init__(self, config: TransNormerConfig):
        super().__init__()
        C = config.decoder_embed_dim
        width = C if config.glu_dim == -1 else config.glu_dim
        self.l1 = nn.Linear(C, width, bias=config.bias)
        self.l2 = nn.Linear(C, width, bias=config.bias)
        self.l3 = nn.Linear(width, C, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.l3(self.l1(x) * self.l2(x))


class TransNormerDecoderLayer(nn.Module):
    def __init__(self, config: TransNormerConfig, layer: int):
        super().__init__()
        self.token_norm, self.channel_norm = SimpleRMSNorm(), SimpleRMSNorm()
        self.token_mixer = TokenMixer(config, layer)
        self.channel_mixer = ChannelMixer(config)

    def forward(self, x, positions, mask, decay, cache):
        x = x + self.token_mixer(self.token_norm(x), positions, mask, decay, cache)
        return x + self.channel_mixer(self.channel_norm(x))


class TransNormerPreTrainedModel(PreTrainedModel):
    config_class = TransNormerConfig
    base_model_prefix = "model"
    _no_split_modules = ("TransNormerDecoderLayer",)
    _is_stateful = True  # a recurrent state cannot be rolled back: generate() refuses assisted decoding

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Lrpe):
            heads, _, size = module.theta.shape
            init.copy_(module.theta, lrpe_theta(heads, size)[:, None])


class TransNormerModel(TransNormerPreTrainedModel):
    """The decoder without the head. Its cache is a TransNormerCache."""

    def __init__(self, config: TransNormerConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.decoder_embed_dim, config.pad_token_id)
        self.layers = nn.ModuleList(TransNormerDecoderLayer(config, i) for i in range(config.decoder_layers))
        self.final_norm = SimpleRMSNorm()
        self.embed_scale = 1.0 if config.no_scale_embedding else math.sqrt(config.decoder_embed_dim)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: TransNormerCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """input_ids [B, T] -> last_hidden_state [B, T, C].

        attention_mask [B, T], or [B, T of before + T] of which the last T columns are read: 0 where a token counts for
        nothing, wherever it stands. inputs_embeds [B, T, C] are taken as they are, not scaled.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds, got both or neither")
        x = self.embed_scale * self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = TransNormerCache(self.config.decoder_layers)
        if past_key_values is not None and not isinstance(past_key_values, TransNormerCache):
            raise ValueError(f"past_key_values: expected a TransNormerCache, got a {type(past_key_values).__name__}")
        mask = self._own_mask(attention_mask, x)
        positions = self._positions(mask, x, past_key_values)
        decay = decays(self.config.decoder_attention_heads, self.config.decoder_layers).to(x.device)
        hidden = []
        for layer, own in zip(self.layers, decay, strict=True):
            hidden.append(x)
            own = own if mask is None else own * mask[..., None]  # a token that counts for nothing lets nothing decay
            x = layer(x, positions, mask, own, past_key_values)
        x = self.final_norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*hidden, x) if output_hidden_states else None,
        )

    @staticmethod
    def _own_mask(attention_mask, x):
        """The columns of attention_mask that belong to x, or None where every token counts."""
        if attention_mask is None:
            return None
        B, T, _ = x.shape
        if attention_mask.dim() != 2 or attention_mask.shape[0] != B or attention_mask.shape[1] < T:
            raise ValueError(f"attention_mask: expected [{B}, {T} or more], got shape {list(attention_mask.shape)}")
        mask = attention_mask[:, -T:].to(x.device) != 0
        return None if T > 1 and mask.all() else mask

    @staticmethod
    def _positions(mask, x, cache):
        """[B, T]: how many tokens that count each row had before. The cache carries the number on, and beam search
        reorders it with the states."""
        B, T, _ = x.shape
        counted = torch.ones(B, T, dtype=torch.long, device=x.device) if mask is None else mask.long()
        ends = counted.cumsum(1)
        if cache is not None:
            ends = ends if cache.lengths is None else ends + cache.lengths[:, None]
            cache.advance(ends[:, -1], T)
        return ends - counted


class TransNormerForCausalLM(TransNormerPreTrainedModel, GenerationMixin):
    """TransNormerLLM with its head. Loads the released checkpoints' parameters under their names.

    `hasten.TransNormer.from_pretrained(folder)`, or AutoModelForCausalLM once `hasten.TransNormer` was touched, which
    registers the model type. Where a gradient is wanted, attention runs token by token in plain torch: right, and slow.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  transformers reads a dict

    def __init__(self, config: TransNormerConfig):
        super().__init__(config)
        self.model = TransNormerModel(config)
        self.lm_head = nn.Linear(config.decoder_embed_dim, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # ours, below

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = TransNormerCache(self.config.decoder_layers)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: TransNormerCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """As TransNormerModel, with logits [B, T, vocabulary], and the loss where labels [B, T] are given."""
        out = self.model(input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, output_hidden_states)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )
