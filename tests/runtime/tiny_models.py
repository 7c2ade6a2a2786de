"""Tiny random models of every family, built from configurations."""

import torch
import transformers as tf

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**GROUPED),
    "llama-tied": lambda: tf.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "llama-biases": lambda: tf.LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True),
    "mistral": lambda: tf.MistralConfig(**GROUPED, sliding_window=32),
    "qwen2": lambda: tf.Qwen2Config(**GROUPED),
    "qwen3": lambda: tf.Qwen3Config(**GROUPED, head_dim=16),
    "gemma": lambda: tf.GemmaConfig(**GROUPED, head_dim=16),
    "gemma2": lambda: tf.Gemma2Config(**GROUPED, head_dim=16),
    "gemma3": lambda: tf.Gemma3TextConfig(**GROUPED, head_dim=16),
    "phi3": lambda: tf.Phi3Config(**GROUPED, **TOKENS),
    "olmo2": lambda: tf.Olmo2Config(**GROUPED),
    "olmo": lambda: tf.OlmoConfig(**GROUPED),
    "olmo3": lambda: tf.Olmo3Config(**GROUPED),
    "ministral": lambda: tf.MinistralConfig(**GROUPED, head_dim=16),
    "ministral3": lambda: tf.Ministral3Config(**GROUPED, head_dim=16),
    "granite": lambda: tf.GraniteConfig(**GROUPED),
    "smollm3": lambda: tf.SmolLM3Config(**GROUPED, **TOKENS),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**SIZES),
    "opt": lambda: tf.OPTConfig(
        hidden_size=64, ffn_dim=176, num_hidden_layers=2, num_attention_heads=4, vocab_size=300, word_embed_proj_dim=64
    ),
    "llava": lambda: tf.LlavaConfig(
        text_config=tf.LlamaConfig(**GROUPED),
        vision_config=tf.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        ),
        image_token_index=299,
    ),
}
# Whose tower takes pictures without hooks that transformers adds at the first run and no pickle takes, as llava's does.
WITH_PICTURES = {
    "paligemma": lambda: tf.PaliGemmaConfig(
        text_config=tf.GemmaConfig(**GROUPED, head_dim=16, pad_token_id=0),
        vision_config=tf.SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            vision_use_head=False,
            projection_dim=64,
        ),
        image_token_index=298,
        projection_dim=64,
        hidden_size=64,
    ),
}
CLASSES = {"llava": tf.LlavaForConditionalGeneration, "paligemma": tf.PaliGemmaForConditionalGeneration}
WITHOUT_GATE = ("gpt_neox", "opt")
MIXTURES = {
    "mixtral": lambda: tf.MixtralConfig(**GROUPED, num_local_experts=2),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
}


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Module:
    """A model of `CONFIGS`, `MIXTURES` or `WITH_PICTURES` with weights large enough that its predictions are not flat."""
    torch.manual_seed(seed)
    config = (CONFIGS | MIXTURES | WITH_PICTURES)[name]()
    model = CLASSES[name](config) if name in CLASSES else tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.15)
            elif parameter_name.endswith("bias"):
                parameter.normal_(std=0.05)
    return model.to(dtype).eval().requires_grad_(False)


def token_ids(rows: int = 3, length: int = 96, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 290, (rows, length), generator=torch.Generator().manual_seed(seed))
