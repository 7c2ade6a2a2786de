"""Tiny random models with linear-attention layers, from configurations: every family that FastLinearAttention knows."""

import torch
import transformers as tf
from running import read
from transformers.cache_utils import LinearAttentionCacheLayerMixin

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BASE = {"vocab_size": 300, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2} | TOKENS
GATED = BASE | {
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 24,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
LATENT = BASE | {
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
PLACES = {
    "image_token_id": 299,
    "video_token_id": 298,
    "image_start_token_id": 297,
    "image_end_token_id": 296,
    "video_start_token_id": 295,
    "video_end_token_id": 294,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 24, "mamba_chunk_size": 32}

CONFIGS = {
    "minimax": lambda: tf.MiniMaxConfig(
        **BASE,
        intermediate_size=48,
        head_dim=16,
        num_hidden_layers=3,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        num_local_experts=2,
        num_experts_per_tok=1,
        block_size=32,
    ),
    "qwen3_next": lambda: tf.Qwen3NextConfig(**GATED, **EXPERTS, head_dim=16),
    "qwen3_5": lambda: tf.Qwen3_5TextConfig(**GATED, head_dim=16),
    "qwen3_5_moe": lambda: tf.Qwen3_5MoeTextConfig(
        **{name: value for name, value in GATED.items() if name != "intermediate_size"}, **EXPERTS, head_dim=16
    ),
    "olmo_hybrid": lambda: tf.OlmoHybridConfig(**GATED | {"linear_num_key_heads": 6}),
    "kimi_linear": lambda: tf.KimiLinearConfig(**LATENT, linear_head_dim=24, linear_num_heads=3),
    "bailing_hybrid": lambda: tf.BailingHybridConfig(**LATENT, linear_head_dim=24, linear_num_heads=3),
    "qwen4_exp": lambda: tf.Qwen4ExpTextConfig(
        **{name: value for name, value in GATED.items() if name != "intermediate_size"},
        **EXPERTS,
        head_dim=16,
        hc_count=2,
        hc_lowrank=8,
        ple_layer_ids=[1],
        heads_per_ngram=2,
        ngram_vocab_size_base=100,
        split_ngram_parts=2,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=512,
        indexer_compress_ratio=4,
    ),
    "glm5_next": lambda: tf.Glm5NextConfig(
        text_config=LATENT
        | {
            "linear_head_dim": 24,
            "linear_num_heads": 3,
            "qk_rope_head_dim": 0,
            "q_lora_rank": 32,
            "n_routed_experts": 4,
            "index_head_dim": 16,
            "index_n_heads": 2,
            "index_topk": 512,
            "hc_mult": 2,
        },
        vision_config={"hidden_size": 32, "depth": 1, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64},
        **PLACES,
    ),
    "lfm2": lambda: tf.Lfm2Config(
        **BASE, intermediate_size=48, num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"]
    ),
    "lfm2_moe": lambda: tf.Lfm2MoeConfig(
        **BASE,
        intermediate_size=48,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_dense_layers=1,
        num_experts=4,
        num_experts_per_tok=2,
        layer_types=["conv", "full_attention", "conv"],
    ),
    "lfm3": lambda: tf.Lfm3Config(
        **BASE,
        head_dim=16,
        intermediate_size=48,
        num_hidden_layers=4,
        layer_types=["conv", "full_attention", "sliding_attention", "conv"],
        sliding_window=32,
    ),
    "mamba2": lambda: tf.Mamba2Config(
        vocab_size=300,
        hidden_size=64,
        num_hidden_layers=3,
        num_heads=8,
        head_dim=16,
        state_size=24,
        n_groups=2,
        chunk_size=32,
        **TOKENS,
    ),
    "mamba": lambda: tf.MambaConfig(vocab_size=300, hidden_size=64, num_hidden_layers=3, state_size=12, **TOKENS),
    "falcon_mamba": lambda: tf.FalconMambaConfig(
        vocab_size=300, hidden_size=64, num_hidden_layers=3, state_size=12, **TOKENS
    ),
    "jamba": lambda: tf.JambaConfig(
        **BASE,
        intermediate_size=48,
        num_hidden_layers=3,
        attn_layer_period=3,
        attn_layer_offset=1,
        num_experts=4,
        mamba_d_state=12,
    ),
    "zamba": lambda: tf.ZambaConfig(
        **BASE | {"num_key_value_heads": 4},
        intermediate_size=48,
        num_hidden_layers=4,
        layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"],
        mamba_d_state=12,
        n_mamba_heads=2,
    ),
    "xlstm": lambda: tf.xLSTMConfig(
        vocab_size=300, hidden_size=128, num_hidden_layers=2, num_heads=2, chunk_size=16, **TOKENS
    ),
    "rwkv": lambda: tf.RwkvConfig(
        vocab_size=300, hidden_size=64, num_hidden_layers=4, context_length=256, rescale_every=2, **TOKENS
    ),
    "bamba": lambda: tf.BambaConfig(**BASE, **MAMBA, num_hidden_layers=3, intermediate_size=48, attn_layer_indices=[1]),
    "falcon_h1": lambda: tf.FalconH1Config(
        **BASE, **MAMBA, mamba_d_ssm=128, num_hidden_layers=2, intermediate_size=48, head_dim=16
    ),
    "granitemoehybrid": lambda: tf.GraniteMoeHybridConfig(
        **BASE,
        **MAMBA,
        num_hidden_layers=3,
        layer_types=["mamba", "attention", "mamba"],
        intermediate_size=48,
        shared_intermediate_size=48,
        num_local_experts=2,
    ),
    "nemotron_h": lambda: tf.NemotronHConfig(
        **BASE,
        head_dim=16,
        layers_block_type=["mamba", "attention", "moe", "mamba"],
        mamba_num_heads=8,
        mamba_head_dim=16,
        ssm_state_size=24,
        n_groups=2,
        chunk_size=32,
        intermediate_size=48,
        n_routed_experts=4,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32,
    ),
    "zamba2": lambda: tf.Zamba2Config(
        **BASE | {"num_key_value_heads": 4},
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        intermediate_size=48,
        n_mamba_heads=8,
        mamba_d_state=24,
        mamba_ngroups=2,
        chunk_size=32,
        adapter_rank=8,
    ),
}

# What transformers 5.23 itself reads in parts otherwise than at once: MiniMax counts no tokens in its cache, and the scan
# of Mamba begins at zero.
WRONG_IN_PARTS = ("minimax", "mamba", "falcon_mamba", "jamba", "zamba")
WITHOUT_A_MASK = ("xlstm", "rwkv")
ONE_ROW = ("rwkv",)  # in decode, where transformers 5.23 mixes the rows of a batch
NO_BEAMS = ("xlstm", "rwkv")  # their caches cannot be reordered
STATES = {  # where a layer does not keep both kinds
    **dict.fromkeys(("minimax", "xlstm", "rwkv"), ("recurrent",)),
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm3"), ("convolution",)),
}


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Module:
    """A model of `CONFIGS` with weights large enough that its predictions are not flat, and decays as trained models
    have them."""
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    kind = tf.AutoModelForImageTextToText if hasattr(config, "vision_config") else tf.AutoModelForCausalLM
    model = kind.from_config(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("A_log"):
                parameter.copy_(torch.rand_like(parameter) * 2)
            elif parameter_name.endswith(("dt_bias", "dt_proj_bias")):
                parameter.copy_(torch.rand_like(parameter) * 3 - 5)
            elif parameter.dim() >= 2:
                parameter.normal_(std=0.15)
    return model.to(dtype).eval().requires_grad_(False)


def ids(rows: int = 2, length: int = 112, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 290, (rows, length), generator=torch.Generator().manual_seed(seed))


def rows(family: str, count: int) -> int:
    """Of a batch that the family can read and decode."""
    return 1 if family in ONE_ROW else count


def generated(model: torch.nn.Module, tokens: torch.Tensor, **settings):
    """What `generate` returns for 8 more tokens; sampling is seeded."""
    torch.manual_seed(1)
    return model.generate(tokens, max_new_tokens=8, pad_token_id=0, eos_token_id=None, **settings)


def expected_logits(
    model: torch.nn.Module, family: str, tokens: torch.Tensor, parts: list[int], mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Of the unchanged model; what it would read wrong in parts it reads at once."""
    return read(model, tokens, [tokens.shape[1]] if family in WRONG_IN_PARTS else parts, mask)


def shorten(cache: object, kind: str) -> None:
    """Gives the first linear-attention layer of a cache a state with heads or channels of another size."""
    if isinstance(cache, list):
        cache[2] = cache[2][:, 1:]
    elif hasattr(cache, "linear_cache"):
        cache.linear_cache[0] = cache.linear_cache[0][..., 1:]
    elif hasattr(cache, "rnn_state"):
        first = cache.rnn_state[0]
        cache.rnn_state[0] = (first[0][..., 1:], *first[1:])
    else:
        entry = next(entry for entry in cache.layers if isinstance(entry, LinearAttentionCacheLayerMixin))
        if kind == "recurrent":
            entry.recurrent_states[0] = entry.recurrent_states[0][..., 1:]
        else:
            entry.conv_states[0] = entry.conv_states[0][:, 1:]
