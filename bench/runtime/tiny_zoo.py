"""Every causal-LM and every image-text-to-text class of the installed transformers, tiny and with random weights.

`build(kind, model_type)` shrinks the default configuration of the type by rules that hold for all (`SIZES`, shortened
lists of layers, ids inside the vocabulary), then by what `EXCEPTIONS` says of this type, and builds the class that
transformers maps the type to. Nothing is downloaded.
"""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

KINDS = {
    "causal": (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING),
    "image-text": (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
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
        *("projector_input_dim", "projector_output_dim", "vision_output_dim", "mm_hidden_size", "projection_hidden_dim"),
        *("image_text_hidden_size", "backbone_hidden_size", "router_hidden_size", "downsample_hidden_size"),
        *("mm_embed_dim", "model_dim", "kv_dim", "hidden_size_global", "input_size", "conv_output_size"),
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
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads"),
        *("attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads", "swa_num_attention_heads"),
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
}  # fmt: skip

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "depth")

# What a type needs beyond the rules: values by the path of the field in the configuration.
EXCEPTIONS: dict[str, dict[str, Any]] = {}

# Types that no tiny configuration builds, with the reason.
IMPOSSIBLE: dict[str, str] = {}


def causal_types() -> list[str]:
    """The model types of transformers' causal-LM classes."""
    return list(KINDS["causal"][0])


def image_text_types() -> list[str]:
    """The model types of transformers' image-text-to-text classes."""
    return list(KINDS["image-text"][0])


def configuration(model_type: str) -> PreTrainedConfig:
    """The tiny configuration of a type."""
    changes: dict[str, dict[str, Any]] = {}
    for path, value in EXCEPTIONS.get(model_type, {}).items():
        part, _, name = path.rpartition(".")
        changes.setdefault(part, {})[name] = value
    return _shrunk(CONFIG_MAPPING[model_type](), changes, "", {})


def build(kind: str, model_type: str, seed: int = 0) -> nn.Module:
    """The class of a kind ("causal" or "image-text") for a type, in eval mode, in float32, with weights from `seed`."""
    if model_type in IMPOSSIBLE:
        raise ValueError(f"{model_type} cannot be built: {IMPOSSIBLE[model_type]}")
    config = configuration(model_type)
    torch.manual_seed(seed)
    model = KINDS[kind][1][type(config)](config)
    _randomise(model)
    return model.eval()


def _fields(config: PreTrainedConfig) -> set[str]:
    return set(inspect.signature(type(config).__init__).parameters) | set(type(config).__dataclass_fields__)


def _shrunk(default: PreTrainedConfig, changes: dict[str, dict[str, Any]], path: str, ids: dict[int, int]):
    """`default` again from its class, with the rules and `changes` applied to it and to its parts."""
    own, known, values = changes.get(path, {}), _fields(default), {}
    for name, value in vars(default).items():
        part = f"{path}.{name}".lstrip(".")
        if name not in known or name in own:
            continue
        if isinstance(value, PreTrainedConfig):
            values[name] = _shrunk(value, changes, part, ids)
        elif name in SIZES and isinstance(value, int):
            values[name] = SIZES[name]
        elif name.endswith(("token_id", "token_index", "_id")) and isinstance(value, int) and value >= VOCABULARY:
            values[name] = ids.setdefault(value, VOCABULARY - 1 - len(ids))
        elif name == "rope_parameters" and isinstance(value, dict):
            values[name] = _rope(value)
    heads = default.__dict__.get("num_attention_heads")
    if heads is not None and heads == default.__dict__.get("num_key_value_heads") and "num_key_value_heads" in values:
        values["num_key_value_heads"] = HEADS
    values |= _layers(default, known) | own
    return type(default)(**values)


def _layers(default: PreTrainedConfig, known: set[str]) -> dict[str, Any]:
    """A number of layers and shortened lists of their kinds, in which every kind of layer still occurs."""
    name = next((name for name in LAYERS if isinstance(vars(default).get(name), int)), None)
    if name is None:
        return {}
    count = vars(default)[name]
    lists = {
        key: value
        for key, value in vars(default).items()
        if isinstance(value, list | tuple) and len(value) == count and key in known and isinstance(value[0], str)
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
