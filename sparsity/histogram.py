"""A streaming histogram of scores on a logarithmic axis, from which the threshold of any sparsity is read."""

from dataclasses import dataclass, field

import torch

# 128 bins an octave keep a threshold within 0.6 % of the exact quantile; 2^-40 .. 2^24 covers the activations of any
# model in half precision.
BINS_PER_OCTAVE, LOWEST_OCTAVE, HIGHEST_OCTAVE = 128, -40, 24
BINS = BINS_PER_OCTAVE * (HIGHEST_OCTAVE - LOWEST_OCTAVE)


@dataclass(slots=True)
class ScoreHistogram:
    """Counts of non-negative scores. Zeros (and what is under 2^-40) are counted apart, so that ReLU activations are
    held exactly.

    No shape of the distribution is assumed: TEAL's reference code takes zero-mean unimodal inputs, which gated
    activations are not.
    """

    zeros: int = 0
    counts: torch.Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.int64))

    @property
    def total(self) -> int:
        return self.zeros + int(self.counts.sum())

    def add(self, scores: torch.Tensor) -> None:
        """Counts `scores`, non-negative and of any shape.

        Raises:
            ValueError: a score is NaN or infinite.
        """
        scores = scores.detach().float().flatten()
        octaves = torch.log2(scores)
        if torch.isnan(octaves).any() or torch.isposinf(octaves).any():
            raise ValueError("scores must be finite, got NaN or infinite ones")
        octaves = octaves[octaves >= LOWEST_OCTAVE]
        bins = ((octaves - LOWEST_OCTAVE) * BINS_PER_OCTAVE).long().clamp_(max=BINS - 1)
        self.zeros += scores.numel() - octaves.numel()
        self.counts += torch.bincount(bins, minlength=BINS).cpu()

    def threshold(self, sparsity: float) -> float:
        """The score up to which a fraction `sparsity` of all scores lies, interpolated within its bin. 0 where zeros
        alone make it up."""
        rank = sparsity * self.total - self.zeros
        if rank <= 0:
            return 0.0
        cumulative = self.counts.cumsum(0)
        index = min(int(torch.searchsorted(cumulative, rank, right=False)), BINS - 1)
        inside = int(self.counts[index])
        below = int(cumulative[index]) - inside
        return float(2.0 ** (LOWEST_OCTAVE + (index + (rank - below) / max(inside, 1)) / BINS_PER_OCTAVE))
