"""What hasten knows about families of models, as data: names of submodules and of classes.
What is not here is found from the structure."""

from dataclasses import dataclass

# Roles of projections, by their path below the decoder layer: `q k v` or the fused `qkv`, `o`, the same with `cross_`
# where they attend to an encoder or an image; `gate up down` or the fused `gate_up down` of a gated MLP, `up down` of a
# plain one.
_ATTENTION = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "out_proj": "o",
    "dense": "o",
    "qkv_proj": "qkv",
    "query_key_value": "qkv",
    "Wqkv": "qkv",
    "c_attn": "qkv",
    "c_proj": "o",
}
_BERT_ATTENTION = {"self.query": "q", "self.key": "k", "self.value": "v", "output.dense": "o"}
_MLP = {
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "gate_up_proj": "gate_up",
    "w1": "gate",
    "w3": "up",
    "w2": "down",
    "fc1": "up",
    "fc2": "down",
    "fc_in": "up",
    "fc_out": "down",
    "c_fc": "up",
    "c_proj": "down",
    "dense_h_to_4h": "up",
    "dense_4h_to_h": "down",
}


def _below(places: tuple[str, ...], names: dict[str, str], prefix: str = "") -> dict[str, str]:
    return {f"{place}.{name}": prefix + role for place in places for name, role in names.items()}


ROLES: dict[str, str] = (
    _below(("self_attn", "self_attention", "attention", "attn"), _ATTENTION)
    | _below(("encoder_attn", "cross_attn"), _ATTENTION, "cross_")
    | _below(("attention",), _BERT_ATTENTION)
    | _below(("crossattention",), _BERT_ATTENTION, "cross_")
    | _below(("mlp", "feed_forward", "ffn"), _MLP)
    | {"fc1": "up", "fc2": "down", "intermediate.dense": "up", "output.dense": "down"}
)


@dataclass(frozen=True, slots=True)
class GatedNames:
    """The names of the projections of a gated MLP, down(act(gate(x)) * up(x)): gate and up apart,
    or fused with the rows of gate first.

    Names that plain MLPs have too are told apart by their shapes.
    """

    down: str
    gate: str | None = None
    up: str | None = None
    gate_up: str | None = None

    @property
    def projections(self) -> tuple[str, ...]:
        return tuple(name for name in (self.gate, self.up, self.gate_up, self.down) if name)


GATED_MLPS = (
    GatedNames("down_proj", gate="gate_proj", up="up_proj"),
    GatedNames("down_proj", gate_up="gate_up_proj"),
    GatedNames("w2", gate="w1", up="w3"),
    GatedNames("wo", gate="wi_0", up="wi_1"),
    GatedNames("proj_down", gate="proj_up_gate", up="proj_up"),
    GatedNames("output_linear", gate_up="input_linear"),
    GatedNames("Wo", gate_up="Wi"),
    GatedNames("fc2", gate_up="fc1"),
)
ACTIVATIONS = ("act_fn", "activation_fn", "activation", "act")

# Classes of transformers' models that are an nn.Linear but for the order of operations; other subclasses compute
# something else.
LINEARS = ("FalconLinear",)

# Linears of transformers' models whose weight their owner reads as it reads a bare parameter, by the owner's class:
# they are never called.
NEVER_CALLED = {
    "MambaMixer": ("dt_proj",),
    "FalconMambaMixer": ("dt_proj",),
    "JambaMambaMixer": ("dt_proj",),
    "LongcatFlashTopkRouter": ("classifier",),
}

# Classes of fused experts that every token goes through, none of which is picked.
NOT_PICKED = ("InklingSharedExperts",)

# Fields of configurations that say how many experts a token picks, and parts of configurations that hold such a field.
PICKS = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
CONFIGS_OF_EXPERTS = ("ffn_config",)

# Attributes of modules whose weight is quantised, in the libraries that transformers loads them with.
QUANTISED_MARKS = ("quant_state", "qweight", "weight_scale", "weight_scale_inv", "qtype", "weight_qtype", "ggml_type")

# Names of the modules that see pictures, below the model that holds them.
VISION_TOWERS = ("vision_tower", "visual", "vision_model", "vision_encoder", "vision_backbone", "image_encoder")

# Arguments of vision towers that read the patches of all pictures as one sequence.
OF_PACKED_PICTURES = {"grid_thw", "image_grid_thw", "image_grid_hw", "image_sizes", "target_sizes"}
