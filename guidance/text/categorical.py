"""Exact draws from categorical laws given by logits: by inverse CDF, and without replacement by Gumbel keys that are drawn lazily."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

Generators = torch.Generator | Sequence[torch.Generator]

FIRST_BLOCK = 64
GROWTH = 4


def uniforms(rows: int, count: int, generator: Generators) -> torch.Tensor:
    """float64 [rows, count] in (0, 1), on the CPU. A sequence of generators gives row r its numbers from generator r.

    Raises:
        ValueError: another number of generators than rows.
    """
    if isinstance(generator, torch.Generator):
        numbers = torch.rand(rows, count, dtype=torch.float64, generator=generator)
    elif len(generator) != rows:
        raise ValueError(f"generator must be one, or one per row: got {len(generator)} for {rows} rows")
    else:
        numbers = torch.stack([torch.rand(count, dtype=torch.float64, generator=own) for own in generator])
    return numbers.clamp_(min=2.0**-54)


def sample(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Independent draws from softmax(logits), by inverse CDF in float64.

    Args:
        logits: [R, V], with at least one finite entry in each row.
        uniform: float64 [R, N] in [0, 1).

    Returns:
        int64 [R, N] on the CPU; never a token whose logit is -inf.
    """
    return _inverse((logits - logits.amax(-1, keepdim=True)).double().exp_(), uniform)


def _inverse(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The inverse CDF of weights [R, V] at uniform numbers [R, N]: int64 [R, N] on the CPU, never an index of weight 0."""
    cdf = weights.cumsum(-1, dtype=torch.float64)
    total = cdf[:, -1:]
    below = torch.nextafter(total, torch.zeros_like(total))
    return torch.searchsorted(cdf, torch.minimum(uniform.to(cdf.device) * total, below), right=True).cpu()


class Block:
    """The race of Gumbel keys in R rows: one key for each of the `size` likeliest tokens, and a stream of keys for all others together.

    Key = logit + Gumbel noise = -log of the time at which an exponential clock of rate exp(logit) rings. The others share one clock of the sum of their
    rates, and which of them it was is drawn when it matters. Everything here is on the CPU but `others`.

    Attributes:
        values: float64 [R, S], the logits of the likeliest tokens. ids: int64 [R, S], which they are.
        others: [R, V], exp(logit - anchor) of the others, and 0 for the likeliest. anchor: float64 [R].
        log_rest: float64 [R], logsumexp of the logits of the others, -inf where there are none.
        log_norm: float64 [R], logsumexp of all.
        turns: [R, 2 S] (greedy: [R, S]), who comes, in order: i < S for likely token i, S + n for the n-th key of the others.
    """

    def __init__(self, logits: torch.Tensor, size: int, generator: Generators, greedy: bool):
        rows, width = logits.shape
        self.size = min(size, width)
        values, ids = logits.topk(min(self.size + 1, width))
        anchor = values[:, -1:].where(
            values[:, -1:].isfinite(), 0.0
        )  # the likeliest of the others: no gap makes all of them vanish
        values, ids = values[:, : self.size], ids[:, : self.size]
        self.others = (logits - anchor).clamp_(max=0.0).exp_().scatter_(1, ids, 0.0)
        rest = self.others.sum(-1, dtype=torch.float64)
        self.values, self.ids = values.double().cpu().numpy(), ids.cpu().numpy()
        self.anchor = anchor[:, 0].double().cpu().numpy()
        with np.errstate(all="ignore"):  # what is not finite is refused by who asked
            self.log_rest = self.anchor + np.log(rest.cpu().numpy())
            self.log_norm = np.logaddexp(np.logaddexp.reduce(self.values, -1), self.log_rest)
            self.turns = np.tile(np.arange(self.size), (rows, 1)) if greedy else self._race(rows, generator)

    def _race(self, rows: int, generator: Generators) -> np.ndarray:
        waits = -np.log1p(-uniforms(rows, 2 * self.size, generator).numpy())
        waits[:, self.size :] = waits[:, self.size :].cumsum(-1)
        rates = np.concatenate([self.values, np.repeat(self.log_rest[:, None], self.size, 1)], -1)
        return (np.log(waits) - rates).argsort(-1)


class LazyOrder:
    """The tokens of one row in the order of draws without replacement from softmax(logits). Iterate over it once.

    Where a block is used up, the race begins anew among the tokens that have not come, with a block four times as large: clocks have no memory, so
    the law of the order is that of one race among all (Plackett-Luce), whatever was drawn so far.

    Args:
        logits: [1, V] float32 or float64, on any device; tokens at -inf never come.
        block, row: the first block, and the row's place in it, which is this order's own from now on.
        generator: the row's, on the CPU.
        greedy: descending logits instead.

    Attributes:
        tokens, log_probabilities: those that have come.
    """

    def __init__(self, logits: torch.Tensor, block: Block, row: int, generator: torch.Generator, greedy: bool = False):
        self._logits, self._generator, self._greedy = logits, generator, greedy
        self._log_norm = float(block.log_norm[row])
        self._enter(block, row)
        self.tokens: list[int] = []
        self.log_probabilities: list[float] = []

    def _enter(self, block: Block, row: int) -> None:
        """`_likely`: the logits of the block's likeliest tokens, -inf for one that has come; `_drawn`: the others that have."""
        self._block, self._row = block, row
        self._likely: list[float] = block.values[row].tolist()
        self._drawn: list[int] = []

    def __iter__(self) -> Iterator[int]:
        yield from self._race()
        while self._block.log_rest[self._row] > -math.inf:
            self._enter(Block(self._without(self.tokens), GROWTH * self._block.size, self._generator, self._greedy), 0)
            yield from self._race()

    def _race(self) -> Iterator[int]:
        size, row = self._block.size, self._row
        ids, others = self._block.ids[row].tolist(), None
        for turn in self._block.turns[row].tolist():
            if turn < size:
                logit = self._likely[turn]
                if logit == -math.inf:
                    return
                self._likely[turn] = -math.inf
                yield self._come(ids[turn], logit)
            elif self._block.log_rest[row] == -math.inf:
                return
            else:
                if others is None:
                    numbers = uniforms(1, size, self._generator)
                    others = _inverse(self._block.others[row : row + 1], numbers)[0].tolist()
                token = others[turn - size]
                if token not in self._drawn:
                    self._drawn.append(token)
                    yield self._come(token, float(self._logits[0, token]))
                if turn == 2 * size - 1:
                    return  # what the others do after their last key is not known

    def _come(self, token: int, logit: float) -> int:
        self.tokens.append(token)
        self.log_probabilities.append(logit - self._log_norm)
        return token

    def log_remaining(self) -> float:
        """log of the probability of all tokens that have not come; by a sum of its own, never by a difference."""
        rest = float(self._block.log_rest[self._row])
        if self._drawn:
            others = self._block.others[self._row]
            others.index_fill_(0, torch.tensor(self._drawn, device=others.device), 0.0)
            left = float(others.sum(dtype=torch.float64))
            rest = float(self._block.anchor[self._row]) + math.log(left) if left > 0 else self._log_vanished()
        top = max(rest, *self._likely)
        if top == -math.inf:
            return top
        return top + math.log(sum(math.exp(logit - top) for logit in (rest, *self._likely))) - self._log_norm

    def _log_vanished(self) -> float:
        """logsumexp of the logits of the others that have not come, where all of those are too far below the anchor for `others`."""
        return float(self._without([*self.tokens, *self._block.ids[self._row].tolist()]).double().logsumexp(-1))

    def _without(self, tokens: list[int]) -> torch.Tensor:
        return self._logits.index_fill(1, torch.tensor(tokens, device=self._logits.device), -torch.inf)
