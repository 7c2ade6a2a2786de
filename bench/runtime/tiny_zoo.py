"""Every causal-LM and every image-text-to-text class of the installed transformers, tiny and with random weights.

`build(kind, model_type)` shrinks the default configuration of the type by rules that hold for all (`SIZES`, shortened
lists of layers, ids inside the vocabulary), then by what `EXCEPTIONS` says of this type, and builds the class that
transformers maps the type to. Nothing is downloaded.
"""

from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

KINDS = {
    "causal": "CAUSAL_LM",
    "image-text": "IMAGE_TEXT_TO_TEXT",
    "encoder-decoder": "SEQ_TO_SEQ_CAUSAL_LM",
    "speech": "SPEECH_SEQ_2_SEQ",
}
VOCABULARY, WIDTH, INNER, HEADS, GROUPS, HEAD = 320, 64, 96, 4, 2, 16

# Values of fields, wherever a configuration or one of its parts has them with a number as the default.
SIZES = {
    "vocab_size": VOCABULARY,
} | dict.fromkeys(
    (
        *("hidden_size", "d_model", "n_embd", "emb_dim", "embed_dim", "embedding_dim", "embedding_size", "dim"),
        *("word_embed_proj_dim", "projection_dim", "text_hidden_size", "out_hidden_size", "encoder_hidden_size"),
        *("decoder_hidden_size", "projector_hidden_size", "input_embedding_size", "output_embedding_size"),
        *("lru_width", "attention_hidden_size", "projection_hidden_size", "output_dim", "output_hidden_size"),
        *("cross_attention_hidden_size", "vision_hidden_size", "hidden_dim", "adapter_in_dim", "adapter_out_dim"),
        *("projector_input_dim", "projector_output_dim", "vision_output_dim", "mm_hidden_size"),
        *("image_text_hidden_size", "backbone_hidden_size", "router_hidden_size", "downsample_hidden_size"),
        *("projection_hidden_dim", "mm_embed_dim"),
        *("model_dim", "kv_dim", "hidden_size_global", "input_size", "conv_output_size"),
        *("pronunciation_embed_dim", "shape_embed_dim"),
    ),
    WIDTH,
) | dict.fromkeys(
    (
        *("intermediate_size", "d_ff", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dff", "dim_ff", "d_inner"),
        *("mlp_dim", "feed_forward_size", "moe_intermediate_size", "shared_expert_intermediate_size", "n_inner"),
        *("shared_intermediate_size", "shared_experts_intermediate_size", "expert_ffn_hidden_size"),
        *("ffn_hidden_size", "intermediate_size_mlp", "dense_intermediate_size", "share_expert_dim"),
        *("alignment_intermediate_size", "projection_intermediate_size", "moe_shared_expert_intermediate_size"),
        *("prefix_dense_intermediate_size", "projector_intermediate_size"),
    ),
    INNER,
) | dict.fromkeys(
    (
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"),
        *("encoder_attention_heads", "attention_heads"),
        *("num_decoder_attention_heads", "num_encoder_attention_heads", "swa_num_attention_heads"),
        *("linear_num_heads", "linear_num_value_heads", "index_n_heads"),
    ),
    HEADS,
) | dict.fromkeys(
    (
        *("num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads", "linear_num_key_heads"),
    ),
    GROUPS,
) | dict.fromkeys(
    (
        *("head_dim", "global_head_dim", "d_kv", "d_head", "dim_head", "attention_head_size", "kv_channels"),
        *("swa_head_dim", "index_head_dim", "qk_nope_head_dim", "v_head_dim", "attention_head_dim"),
        *("linear_head_dim", "linear_key_head_dim", "linear_value_head_dim", "query_pre_attn_scalar"),
    ),
    HEAD,
) | {
    "qk_rope_head_dim": 8,
    "qk_head_dim": HEAD + 8,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "rotary_dim": 8,
} | dict.fromkeys(
    (
        *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "depth"),
        *("num_decoder_layers", "num_encoder_layers", "num_global_layers", "layers"),
    ),
    2,
) | dict.fromkeys(
    (
        *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    ),
    4,
) | dict.fromkeys(
    (
        *("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"),
    ),
    2,
) | dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts", "moe_num_shared_experts"), 1) | {
    "image_size": 16,
    "patch_size": 4,
    "crop_size": 16,
    "sliding_window": 32,
    "attention_chunk_size": 32,
    "index_topk": 16,
    "index_block_size": 8,
    "index_topk_blocks": 2,
}  # fmt: skip

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "depth")

AT_MOST_ONE = ("first_k_dense_replace", "num_dense_layers")

# What a configuration needs beyond the rules, by its model type, or by its class where it has none. It may stand alone
# or be a part of another.
NGRAMS = {"ple_layer_ids": [1], "heads_per_ngram": 2, "ngram_vocab_size_base": 100, "split_ngram_parts": 2}
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
MAMBA2 = {"state_size": 24, "n_groups": 2, "chunk_size": 16}
SHARED_KEYS = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
}
PER_LAYER_INPUT = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16}
AUTOENCODER = {"base_channels": 32, "channel_multiplier": (1, 1), "num_res_blocks": 1, "latent_channels": 16}
SAM = {"output_channels": 32, "downsample_channels": [32, WIDTH], "global_attn_indexes": [1], "window_size": 2}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
MAMBA_LAYERS = {
    "mamba_n_heads": 8,
    "mamba_d_head": HEAD,
    "mamba_d_state": 24,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 16,
}
PLACES = {"image_token_id": VOCABULARY - 1, "video_token_id": VOCABULARY - 2}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": MAMBA_LAYERS | {"attn_layer_indices": [1], "num_hidden_layers": 3},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "falcon_h1": MAMBA_LAYERS | {"mamba_d_ssm": 8 * HEAD},
    "glm4v_text": MROPE,
    "glm4v_moe_text": {
        "rope_parameters": MROPE["rope_parameters"] | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
    },
    "glm_ocr_text": MROPE,
    "granitemoehybrid": MAMBA_LAYERS
    | {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_hidden_layers": 3,
        "num_local_experts": 4,
    },
    "hunyuan_vl_text": {"rope_parameters": MROPE["rope_parameters"] | {"mrope_section": [2, 2, 2, 2]}},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2},
    "paddleocr_vl_text": MROPE,
    "qwen2_5_omni_text": MROPE,
    "qwen2_5_vl_text": MROPE,
    "qwen2_vl_text": MROPE,
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 32},
    "step3p5": {
        "layer_types": ["full_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "sliding_window": 32,
    },
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "blip-2": {"image_token_index": VOCABULARY - 1},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "chameleon": {"vocabulary_map": {"<image>": 319, "IMGIMGAZ": 318, "IMGIMGBZ": 317}},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
        }
    },
    "DbrxAttentionConfig": {"rope_theta": 10000.0, "clip_qkv": 8.0},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "deepseek_v4": {"o_lora_rank": 16, "o_groups": 2},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "dots3_note_text": {
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": HEAD + 8,
        "swa_qk_nope_head_dim": HEAD,
        "swa_v_head_dim": HEAD,
        "head_dim": HEAD + 8,
    },
    "emu3": {"vocabulary_map": {"<image>": 319, "<|extra_200|>": 318, "<|visual token 000000|>": 317}},
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {"rope_theta": 500000.0, "mrope_section": [3, 3, 2]},
        "moe_intermediate_size": [INNER, INNER],
    },
    "florence_vision": {"depths": (1, 1), "patch_size": (3, 3), "patch_stride": (2, 2), "patch_padding": (1, 1)}
    | {"patch_prenorm": (False, True), "embed_dim": (32, 64), "num_heads": (2, 2), "num_groups": (2, 2)}
    | {"window_size": 2},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma3n_text": SHARED_KEYS
    | PER_LAYER_INPUT
    | {"intermediate_size": INNER, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0]},
    "gemma4_text": PER_LAYER_INPUT | {"global_head_dim": 2 * HEAD},
    "gemma4_unified_text": {"global_head_dim": 2 * HEAD},
    "diffusion_gemma_text": {
        "global_head_dim": 2 * HEAD,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": INNER,
    },
    "deepseek_ocr2_sam_vision_model": SAM,
    "dots3_note_audio_encoder": {"adapter_input_size": WIDTH},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "glm5_next_text": {"qk_rope_head_dim": 0, "head_dim": 0},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "downsample_rate": "1/2"},
    "hunyuan_vl_vision": {"max_image_size": 64, "img_max_token_num": 64},
    "instructblip": {"image_token_index": VOCABULARY - 1},
    "instructblipvideo": {"video_token_index": VOCABULARY - 1},
    "janus_vqgan": AUTOENCODER,
    "chameleon_vqgan": AUTOENCODER | {"resolution": 16},
    "emu3_vqgan": AUTOENCODER,
    "kosmos-2": {"latent_query_num": 4},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "longcat_flash": {"zero_expert_num": 2, "head_dim": 8},
    "mamba2": MAMBA2 | {"num_heads": 8},
    "mllama_text_model": {"cross_attention_layers": [1], "num_hidden_layers": 3},
    "mllama_vision_model": {"intermediate_layers_indices": [0], "vision_output_dim": 2 * WIDTH},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "molmo2_vision": {"image_size": [16, 16], "patch_size": 4},
    **dict.fromkeys(("minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "nemotron_h_omni"), PLACES),
    "mistral4": {"qk_rope_head_dim": HEAD},
    "muse_spark_audio": {"patch_sizes": (4, 2), "hidden_sizes": (32, WIDTH), "depths": (1, 1)},
    "muse_spark_text": {"moe_hidden_size": WIDTH},
    "nemotron": {"num_key_value_heads": GROUPS},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": HEAD, "ssm_state_size": 24, "n_groups": 2, "chunk_size": 16},
    "qwen4_exp_text": INDEXER | NGRAMS | {"hc_lowrank": 16, "eos_token_id": 2},
    "radio": {"max_img_size": 32},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": (16, 32),
        "axial_pos_embds_dim": (16, 48),
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
        "num_buckets": 4,
        "hash_seed": 0,
        "attn_layers": ["local", "lsh"],
    },
    "unlimited_ocr_sam_vision_model": SAM,
    "zamba": {
        "attention_hidden_size": 2 * WIDTH,
        "attention_head_dim": 2 * HEAD,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
        "n_mamba_heads": 8,
        "mamba_d_state": 24,
        "mamba_ngroups": 2,
        "chunk_size": 16,
        "adapter_rank": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}

# Types that no tiny configuration builds, with the reason.
TIMM = "its vision tower is one of timm's, which is not installed"
SHARED = "all its layers share the keys and values of another model, and transformers' own check refuses such a decoder"
SPEECH = "its speech tower has sizes of its own, which the rules do not shrink"
IMPOSSIBLE: dict[str, str] = {
    "fast_vlm": TIMM,
    "fun_asr_nano": SPEECH,
    "gemma3n": TIMM,
    "gemma4_assistant": SHARED,
    "gemma4_unified_assistant": SHARED,
    "kyutai_speech_to_text": SPEECH,
    "moonshine_streaming": SPEECH,
    "nemo_speechlm": SPEECH,
    "perception_lm": TIMM,
    "seamless_m4t": SPEECH,
    "seamless_m4t_v2": SPEECH,
    "vibevoice": SPEECH,
    "vibevoice_asr": SPEECH,
}


def types(kind: str) -> list[str]:
    """The model types of the classes of a kind: one of `KINDS`."""
    return list(getattr(modeling_auto, f"MODEL_FOR_{KINDS[kind]}_MAPPING_NAMES"))


def causal_types() -> list[str]:
    """The model types of transformers' causal-LM classes."""
    return types("causal")


def image_text_types() -> list[str]:
    """The model types of transformers' image-text-to-text classes."""
    return types("image-text")


def model_class(kind: str, model_type: str) -> type[nn.Module]:
    """The class that transformers maps a type to."""
    return getattr(modeling_auto, f"MODEL_FOR_{KINDS[kind]}_MAPPING")[CONFIG_MAPPING[model_type]]


def configuration(kind: str, model_type: str) -> PreTrainedConfig:
    """The tiny configuration from which `build` makes the model: of the type, or the part that its class takes."""
    config_class = CONFIG_MAPPING[model_type]
    config = _shrunk(config_class, {}, {})
    taken = model_class(kind, model_type).config_class
    if not isinstance(config, taken):
        config = next((part for part in vars(config).values() if isinstance(part, taken)), config)
    if kind == "causal" and getattr(config, "is_decoder", None) is False and "add_cross_attention" in vars(config):
        config.is_decoder = True  # an encoder that is used as a decoder attends to what came before alone
    return config


def build(kind: str, model_type: str, seed: int = 0) -> nn.Module:
    """The class of a kind of `KINDS` for a type, in eval mode, in float32, with weights from `seed`.

    Raises:
        ValueError: the type is in `IMPOSSIBLE`; the message gives the reason.
    """
    if model_type in IMPOSSIBLE:
        raise ValueError(f"{model_type} cannot be built: {IMPOSSIBLE[model_type]}")
    config = configuration(kind, model_type)
    torch.manual_seed(seed)
    model = model_class(kind, model_type)(config)
    _randomise(model)
    return model.eval()


def _shrunk(config_class: type, given: dict[str, Any], ids: dict[int, int]) -> PreTrainedConfig:
    """A configuration with the rules and the exceptions applied to it and to its parts.

    `given` is what it has anyway as a part of another; `ids` maps ids beyond the vocabulary to ids inside.
    """
    own = EXCEPTIONS.get(config_class.model_type or config_class.__name__, {})
    default, values = config_class(**given), dict(given)
    for name, value in _stored(default).items():
        if name in own:
            continue
        if isinstance(value, PreTrainedConfig):
            values[name] = _shrunk(type(value), _given(value), ids)
        elif (name in SIZES and type(value) is int) or name == "head_dim":
            values[name] = SIZES[name]
        elif name in ("image_size", "patch_size") and isinstance(value, list | tuple) and len(value) == 2:
            values[name] = type(value)([SIZES[name]] * 2)
        elif name in AT_MOST_ONE and value:
            values[name] = 1
        elif name.endswith(("token_id", "token_index", "_id")) and type(value) is int and value >= VOCABULARY:
            values[name] = ids.setdefault(value, VOCABULARY - 1 - len(ids))
        elif name == "rope_parameters" and isinstance(value, dict):
            values[name] = _rope(value)
        elif name == "deepstack_visual_indexes" and value:
            values[name] = [0]
    stored = _stored(default)
    if "num_key_value_heads" in values and stored["num_key_value_heads"] == stored.get("num_attention_heads"):
        values["num_key_value_heads"] = HEADS
    return config_class(**values | _layers(stored) | own)


def _stored(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a configuration, under the names that its class takes."""
    names = {name: type(config).attribute_map.get(name, name) for name in type(config).__dataclass_fields__}
    return {name: vars(config)[stored] for name, stored in names.items() if stored in vars(config)}


def _given(config: PreTrainedConfig) -> dict[str, Any]:
    """What a part of a configuration has besides the defaults of its class."""
    plain = _stored(type(config)())
    return {
        name: value
        for name, value in _stored(config).items()
        if not isinstance(value, PreTrainedConfig) and value != plain.get(name)
    }


def _layers(stored: dict[str, Any]) -> dict[str, Any]:
    """A number of layers and shortened lists of their kinds, in which every kind of layer still occurs."""
    name = next((name for name in LAYERS if type(stored.get(name)) is int), None)
    lists = {
        key: value
        for key, value in stored.items()
        if isinstance(value, list | tuple) and value and isinstance(value[0], str) and len(value) == stored.get(name)
    }
    if not lists:
        return {}
    first: dict[tuple, int] = {}
    for i, kinds in enumerate(zip(*lists.values(), strict=True)):
        first.setdefault(kinds, i)
    chosen = sorted(first.values())
    if len(chosen) == 1:
        chosen *= 2
    return {name: len(chosen)} | {key: [value[i] for i in chosen] for key, value in lists.items()}


def _rope(value: dict) -> dict:
    """Rotary parameters whose sections of multimodal positions add up to half a head."""
    value = {key: _rope(part) if isinstance(part, dict) else part for key, part in value.items()}
    if section := value.get("mrope_section"):
        half = int(HEAD * value.get("partial_rotary_factor", 1)) // 2
        rest = [max(1, half * size // sum(section)) for size in section[1:]]
        value["mrope_section"] = [half - sum(rest), *rest]
    return value


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Weights as large as keeps activations of one size, so that predictions are not flat; biases that matter."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(std=module.in_features**-0.5)
        elif isinstance(module, Conv1D):
            module.weight.normal_(std=module.nx**-0.5)
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(std=0.5)
        if isinstance(module, nn.Linear | Conv1D) and module.bias is not None:
            module.bias.normal_(std=0.05)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and name.endswith(("gate_up_proj", "down_proj", "up_proj", "gate_proj")):
            parameter.normal_(std=INNER**-0.5)
