"""Layers of a cache that hold fewer entries than tokens were read: tokens that were dropped have none.

A shortened layer knows which token each of its entries is. To transformers it reports the number of tokens that were
read, so that positions and masks are made as if none had been dropped.
"""

from dataclasses import dataclass

import torch
from transformers.cache_utils import DynamicLayer

from hasten.errors import StateError


@dataclass(frozen=True, slots=True)
class Entries:
    """What the entries of a shortened layer stand for.

    Attributes:
        tokens: int64 [B, n], increasing: which token of those that were read each entry is.
        bias: float32 [B, n], added to the logits of every query: -inf for an entry that only fills a shorter row, the
            logarithm of the number of tokens that it was merged of for others; None where it is 0 everywhere.
        read: how many tokens were read.
    """

    tokens: torch.Tensor
    bias: torch.Tensor | None
    read: int

    @classmethod
    def all_of(cls, tokens: int, rows: int, device: torch.device) -> "Entries":
        """Those of `tokens` tokens, none of them dropped."""
        return cls(torch.arange(tokens, device=device).expand(rows, -1), None, tokens)

    def seen(self) -> torch.Tensor:
        """bool [B, n]: False for those that only fill a row."""
        return torch.ones_like(self.tokens, dtype=torch.bool) if self.bias is None else self.bias > -torch.inf

    def sizes(self) -> torch.Tensor:
        """float32 [B, n]: of how many tokens each was merged; 1 for those that were not."""
        sizes = torch.ones(self.tokens.shape, device=self.tokens.device)
        return sizes if self.bias is None else torch.where(self.seen(), self.bias.exp().round(), sizes)

    def followed_by(self, other: "Entries") -> "Entries":
        """These, and then those of the tokens that were read next, which `other` counts from 0."""
        bias = None
        if self.bias is not None or other.bias is not None:
            bias = torch.cat([part._bias() for part in (self, other)], 1)
        return Entries(torch.cat([self.tokens, other.tokens + self.read], 1), bias, self.read + other.read)

    def _bias(self) -> torch.Tensor:
        if self.bias is None:
            return torch.zeros(self.tokens.shape, device=self.tokens.device)
        return self.bias

    def of_rows(self, rows: torch.Tensor) -> "Entries":
        rows = rows.to(self.tokens.device)
        return Entries(self.tokens[rows], None if self.bias is None else self.bias[rows], self.read)

    def between(self, first: int, end: int | None, read: int) -> "Entries":
        return Entries(self.tokens[:, first:end], None if self.bias is None else self.bias[:, first:end], read)


class ShortenedLayer(DynamicLayer):
    """Keys and values [B, G, n, D] of n of the tokens that were read.

    Args:
        window: how many tokens a query of this layer sees, itself among them; None for all.

    Attributes:
        entries: which tokens they are; None before the first.
        next: the same with those that the next `update` adds, as a layer of the accelerated model says before it.
    """

    def __init__(self, window: int | None = None):
        super().__init__()
        self.sliding_window = window
        self.is_sliding = window is not None
        self.record_past = False
        self.entries: Entries | None = None
        self.next: Entries | None = None

    @classmethod
    def taking_over(cls, layer: DynamicLayer) -> "ShortenedLayer":
        """A layer that goes on with what another one holds."""
        other = cls(getattr(layer, "sliding_window", None))
        other.record_past = getattr(layer, "record_past", False)
        if layer.is_initialized:
            other.lazy_initialization(layer.keys, layer.values)
            other.keys, other.values = layer.keys, layer.values
            rows, read, held = len(layer.keys), layer.get_seq_length(), layer.keys.shape[-2]
            other.entries = Entries.all_of(read, rows, layer.keys.device).between(read - held, None, read)
        return other

    def update(self, key_states, value_states, *args, **kwargs):
        if self.next is None:
            raise StateError(
                "the cache holds fewer entries than tokens were read, for image tokens were dropped: go on with the "
                "model that hasten.accelerate changed, by its own forward or generate, or read the prompt again"
            )
        after, self.next = self.next, None
        keys, values = super().update(key_states, value_states)
        self.entries = after
        self._forget()
        return keys, values

    def get_seq_length(self) -> int:
        return 0 if self.entries is None else self.entries.read

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        read = self.get_seq_length()
        first = 0 if self.sliding_window is None else max(read - self.sliding_window + 1, 0)
        return read + query_length - first, first

    def activate_past_recording(self) -> None:
        """Keeps what has left the window until the next `crop`."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens, so many as `tokens_to_remove` is below 0.

        Raises:
            ValueError: a number above 0, or dropped tokens among them.
            RuntimeError: what would be in the window then was forgotten, as transformers' own layer raises.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove below 0, got {tokens_to_remove}")
        if self.entries is None:
            return
        if self.sliding_window is not None and self.entries.read >= self.sliding_window and not self.record_past:
            raise RuntimeError("crop behind a sliding window: call activate_past_recording before it is filled")
        read = self.entries.read + tokens_to_remove
        kept = (self.entries.tokens < read).sum(1)
        if not bool((kept == kept[0]).all()):
            raise ValueError(
                f"crop of {-tokens_to_remove} tokens would leave rows of different lengths: some of them were dropped"
            )
        self._cut(0, int(kept[0]), read)
        self._forget(cropped=True)

    def reset(self) -> None:
        super().reset()
        self.entries = self.next = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        if self.entries is not None:
            self.entries = self.entries.of_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.entries is not None:
            rows = torch.arange(len(self.entries.tokens), device=self.entries.tokens.device)
            self.entries = self.entries.of_rows(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        if self.entries is not None:
            self.entries = self.entries.of_rows(indices)

    def _forget(self, cropped: bool = False) -> None:
        """Drops what no later query sees: the first entries that have left the window in every row."""
        held = self.keys.shape[-2]
        if self.sliding_window is None or held < self.sliding_window or (self.record_past and not cropped):
            return
        left = (self.entries.tokens <= self.entries.read - self.sliding_window).sum(1).min()
        self._cut(int(left), held, self.entries.read)

    def _cut(self, first: int, end: int, read: int) -> None:
        self.keys, self.values = self.keys[..., first:end, :], self.values[..., first:end, :]
        self.entries = self.entries.between(first, end, read)
