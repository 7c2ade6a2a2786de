"""The configuration of TransNormerLLM, with the keys and defaults of the released checkpoints."""

from dataclasses import field

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig


@strict
class TransNormerConfig(PreTrainedConfig):
    """Names and defaults are those of OpenNLPLab's `TransnormerConfig`.

    decoder_embed_dim, decoder_layers, decoder_attention_heads, glu_dim: the sizes; glu_dim = -1 is decoder_embed_dim.
    hidden_dim: width of q, k, v and u, a multiple of the heads.
    linear_use_lrpe_list: one 0 or 1 per layer, whether it has the relative position encoding LRPE; empty for none.
    no_scale_embedding: False multiplies embeddings by sqrt(decoder_embed_dim).
    norm_type, linear_act_fun: only "simplermsnorm", and "silu" or "swish".
    bias: of the linear layers, never of the head.

    Raises:
        ValueError: a value that the model cannot compute, by its name.
    """

    model_type = "transnormer"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map = {  # noqa: RUF012  transformers reads a plain dict
        "hidden_size": "decoder_embed_dim",
        "num_hidden_layers": "decoder_layers",
        "num_attention_heads": "decoder_attention_heads",
        "initializer_range": "init_std",
    }

    vocab_size: int = 64000
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    use_cache: bool = True
    init_std: float = 0.02
    decoder_embed_dim: int = 1024
    decoder_layers: int = 24
    decoder_attention_heads: int = 8
    no_scale_embedding: bool = False
    add_bos_token: bool = False
    norm_type: str = "simplermsnorm"
    linear_use_lrpe_list: list = field(default_factory=list)
    hidden_dim: int = 1024
    linear_act_fun: str = "silu"
    glu_dim: int = 2816
    bias: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        self._check()
        super().__post_init__(**kwargs)

    def _check(self):
        for name in ("vocab_size", "decoder_embed_dim", "decoder_layers", "decoder_attention_heads", "hidden_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.glu_dim < 1 and self.glu_dim != -1:
            raise ValueError(f"glu_dim: expected at least 1, or -1 for decoder_embed_dim, got {self.glu_dim}")
        if self.hidden_dim % self.decoder_attention_heads:
            heads = f"decoder_attention_heads = {self.decoder_attention_heads}"
            raise ValueError(f"hidden_dim: expected a multiple of {heads}, got {self.hidden_dim}")
        if self.norm_type != "simplermsnorm":
            raise ValueError(f"norm_type: expected 'simplermsnorm', got {self.norm_type!r}")
        if self.linear_act_fun not in ("silu", "swish"):
            raise ValueError(f"linear_act_fun: expected 'silu' or 'swish', got {self.linear_act_fun!r}")
        listed = self.linear_use_lrpe_list
        if listed and (len(listed) != self.decoder_layers or any(use not in (0, 1) for use in listed)):
            expected = f"one 0 or 1 for each of the {self.decoder_layers} layers, or nothing"
            raise ValueError(f"linear_use_lrpe_list: expected {expected}, got {listed}")

    @property
    def layer_types(self) -> list[str]:
        return ["linear_attention"] * self.decoder_layers

    @property
    def uses_lrpe(self) -> list[bool]:
        return [bool(use) for use in self.linear_use_lrpe_list] or [False] * self.decoder_layers
