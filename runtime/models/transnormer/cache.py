"""What TransNormer keeps of the tokens it has read: one state per layer, of constant size."""

import torch
from transformers.cache_utils import Cache, LinearAttentionLayer


class TransNormerCache(Cache):
    """One state [B, H, K, V] in float32 per layer, and how far each row has come.

    lengths: [B] how many tokens that count each row has read: the position of its next one. None before the first
        token.
    """

    def __init__(self, layers: int):
        super().__init__(layers=[LinearAttentionLayer() for _ in range(layers)])
        self.lengths: torch.Tensor | None = None
        self._read = 0

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    def state(self, layer: int) -> torch.Tensor | None:
        """The state of a layer, to be updated in place, or None before the first token."""
        held = self.layers[layer]
        return held.recurrent_states[0] if held.has_previous_state[0] else None

    def keep(self, layer: int, state: torch.Tensor) -> None:
        held = self.layers[layer]
        held.update_recurrent_state(state)
        held.has_previous_state[0] = True

    def advance(self, lengths: torch.Tensor, T: int) -> None:
        """Notes that T more columns, padding included, were read, after which rows stand at `lengths` [B]."""
        self.lengths = lengths
        self._read += T

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many columns were read, padding included."""
        return self._read

    def crop(self, *args, **kwargs):
        raise NotImplementedError(
            "TransNormer's cache cannot be cropped: a recurrent state sums all tokens up and cannot be rolled back; "
            "start again from an empty cache (assisted decoding is impossible for the same reason)"
        )

    def reset(self) -> None:
        super().reset()
        self.lengths, self._read = None, 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._pick(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._pick(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._pick(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def _pick(self, rows) -> None:
        """Puts rows(tensor) in place of everything that has a batch."""
        if self.lengths is None:
            return
        self.lengths = rows(self.lengths)
        for layer in self.layers:
            layer.recurrent_states[0] = rows(layer.recurrent_states[0])
