"""Exact draws from categorical laws given by logits: by inverse CDF, and without replacement by lazy Gumbel keys."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from hasten.guidance.inverse_cdf import Generators, inverse_cdf, uniforms

FIRST_SIZE = 64
GROWTH = 4


def sample(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Independent draws from softmax(logits), by inverse CDF in float64.

    Args:
        logits: [R, V], with at least one finite entry in each row.
        uniform: float64 [R, N] in [0, 1).

    Returns:
        int64 [R, N] on the CPU; never a token whose logit is -inf.
    """
    return inverse_cdf((logits - logits.amax(-1, keepdim=True)).double().exp_(), uniform).cpu()


class GumbelRace:
    """Gumbel keys in R rows: one for each of the `size` likeliest tokens, and a stream of keys for all others together.

    Key = logit + Gumbel noise = -log of the time at which an exponential clock of rate exp(logit) rings. The others
    share one clock of the sum of their rates, and which of them it was is drawn when it matters. Everything here is on
    the CPU but `others`.

    Attributes:
        values: float64 [R, S], the logits of the likeliest tokens. ids: int64 [R, S], which they are.
        others: [R, V], exp(logit - anchor) of the others, and 0 for the likeliest. anchor: float64 [R].
        log_rest: float64 [R], logsumexp of the logits of the others, -inf where there are none.
        log_norm: float64 [R], logsumexp of all.
        turns: [R, 2 S] (greedy: [R, S]), who comes, in order: i < S for likely token i, S + n for key n of the others.
    """

    def __init__(self, logits: torch.Tensor, size: int, generator: Generators, greedy: bool):
        rows, width = logits.shape
        self.size = min(size, width)
        values, ids = logits.topk(min(self.size + 1, width))
        # The likeliest of the others: however far behind the first they are, not all of them vanish.
        anchor = values[:, -1:].where(values[:, -1:].isfinite(), 0.0)
        values, ids = values[:, : self.size], ids[:, : self.size]
        self.others = (logits - anchor).clamp_(max=0.0).exp_().scatter_(1, ids, 0.0)
        rest = self.others.sum(-1, dtype=torch.float64)
        self.values, self.ids = values.double().cpu().numpy(), ids.cpu().numpy()
        self.anchor = anchor[:, 0].double().cpu().numpy()
        with np.errstate(all="ignore"):  # what is not finite is refused by who asked
            self.log_rest = self.anchor + np.log(rest.cpu().numpy())
            self.log_norm = np.logaddexp(np.logaddexp.reduce(self.values, -1), self.log_rest)
            self.turns = np.tile(np.arange(self.size), (rows, 1)) if greedy else self._order(rows, generator)

    def _order(self, rows: int, generator: Generators) -> np.ndarray:
        waits = -np.log1p(-uniforms(rows, 2 * self.size, generator).numpy())
        waits[:, self.size :] = waits[:, self.size :].cumsum(-1)
        rates = np.concatenate([self.values, np.repeat(self.log_rest[:, None], self.size, 1)], -1)
        return (np.log(waits) - rates).argsort(-1)


class LazyOrder:
    """The tokens of one row in the order of draws without replacement from softmax(logits). Iterate over it once.

    Where a race is over, another one begins among the tokens that have not come, with four times as many keys:
    exponential clocks have no memory, so the law of the order is that of one race among all (Plackett-Luce), whatever
    was drawn so far.

    Args:
        logits: [1, V] float32 or float64, on any device; tokens at -inf never come.
        race, row: the first race, and the row's place in it, which is this order's own from now on.
        generator: the row's, on the CPU.
        greedy: descending logits instead.

    Attributes:
        tokens, log_probabilities: those that have come.
    """

    def __init__(
        self, logits: torch.Tensor, race: GumbelRace, row: int, generator: torch.Generator, greedy: bool = False
    ):
        self._logits, self._generator, self._greedy = logits, generator, greedy
        self._log_norm = float(race.log_norm[row])
        self._enter(race, row)
        self.tokens: list[int] = []
        self.log_probabilities: list[float] = []

    def _enter(self, race: GumbelRace, row: int) -> None:
        """`_likely`: the logits of the likeliest tokens, -inf for one that has come; `_drawn`: the others that have."""
        self._race, self._row = race, row
        self._likely: list[float] = race.values[row].tolist()
        self._drawn: list[int] = []

    def __iter__(self) -> Iterator[int]:
        yield from self._run()
        while self._race.log_rest[self._row] > -math.inf:
            left = self._without(self.tokens)
            self._enter(GumbelRace(left, GROWTH * self._race.size, self._generator, self._greedy), 0)
            yield from self._run()

    def _run(self) -> Iterator[int]:
        """The tokens of one race, up to where it no longer tells who comes next."""
        race, size, row = self._race, self._race.size, self._row
        ids, others = race.ids[row].tolist(), None
        for turn in race.turns[row].tolist():
            if turn < size:
                logit = self._likely[turn]
                if logit == -math.inf:
                    return
                self._likely[turn] = -math.inf
                yield self._come(ids[turn], logit)
            elif race.log_rest[row] == -math.inf:
                return
            else:
                if others is None:
                    numbers = uniforms(1, size, self._generator)
                    others = inverse_cdf(race.others[row : row + 1], numbers)[0].tolist()
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
        rest = float(self._race.log_rest[self._row])
        if self._drawn:
            others = self._race.others[self._row]
            others.index_fill_(0, torch.tensor(self._drawn, device=others.device), 0.0)
            left = float(others.sum(dtype=torch.float64))
            rest = float(self._race.anchor[self._row]) + math.log(left) if left > 0 else self._log_vanished()
        top = max(rest, *self._likely)
        if top == -math.inf:
            return top
        return top + math.log(sum(math.exp(logit - top) for logit in (rest, *self._likely))) - self._log_norm

    def _log_vanished(self) -> float:
        """logsumexp of the logits of the others that have not come, where all of those are 0 in `others`."""
        return float(self._without([*self.tokens, *self._race.ids[self._row].tolist()]).double().logsumexp(-1))

    def _without(self, tokens: list[int]) -> torch.Tensor:
        return self._logits.index_fill(1, torch.tensor(tokens, device=self._logits.device), -torch.inf)
