"""What a schedule costs: operations of a prefill, and bytes of the KV cache."""

from collections.abc import Sequence
from dataclasses import dataclass

from hasten.sparsity.vision_tokens.schedules import kept


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one decoder layer computes for a token.

    Args:
        macs: multiply-accumulates of its projections per token, which is the number of weights that a token meets (of a
            mixture of experts, those of the experts that one token picks).
        heads, kv_heads: query heads, and the key-value heads that they share.
        head_dim: of queries, keys and values.
    """

    macs: int
    heads: int
    kv_heads: int
    head_dim: int

    def __post_init__(self):
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")

    def operations(self, tokens: int) -> int:
        """Of a causal prefill: two per multiply-accumulate. Each of the tokens (tokens + 1) / 2 pairs of a query and a
        key takes part in two products over head_dim, with the key and with the value."""
        pairs = tokens * (tokens + 1) // 2
        return 2 * tokens * self.macs + 4 * pairs * self.heads * self.head_dim

    def kv_elements(self, tokens: int) -> int:
        return 2 * tokens * self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one prompt, in the decoder layers alone: without embeddings, head, vision tower, and the scoring and gathering
    of tokens, for which no operations are counted.

    Args:
        operations: of the prefill.
        image_operations: those that would not be without the image tokens.
        kv_bytes: of all layers' caches after the prefill.
        decode_bytes: what a decode step after it reads, weights and caches.
    """

    operations: int
    image_operations: int
    kv_bytes: int
    decode_bytes: int


def prefill_cost(
    shares: Sequence[float], text_tokens: int, image_tokens: int, layers: Sequence[LayerShape], element_bytes: int = 2
) -> Cost:
    """The cost of a prompt under a schedule.

    Args:
        shares: of the image tokens that each layer sees, as `Schedule.shares` gives them; ones for no pruning.
        text_tokens, image_tokens: of the prompt. A layer sees all of the text.
        layers: one shape per layer. Attention is counted as causal over the whole prompt: less where it slides.
        element_bytes: of a weight and of an element of the cache.

    Raises:
        ValueError: not as many shares as layers, a negative number of tokens, or element_bytes under 1.
    """
    if len(shares) != len(layers):
        raise ValueError(f"one share per layer is expected, got {len(shares)} shares and {len(layers)} layers")
    for name, value, least in (
        ("text_tokens", text_tokens, 0),
        ("image_tokens", image_tokens, 0),
        ("element_bytes", element_bytes, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    lengths = [text_tokens + kept(share, image_tokens) for share in shares]
    operations = sum(layer.operations(length) for layer, length in zip(layers, lengths, strict=True))
    kv_bytes = element_bytes * sum(layer.kv_elements(length) for layer, length in zip(layers, lengths, strict=True))
    return Cost(
        operations=operations,
        image_operations=operations - sum(layer.operations(text_tokens) for layer in layers),
        kv_bytes=kv_bytes,
        decode_bytes=kv_bytes + element_bytes * sum(layer.macs for layer in layers),
    )
