"""Exact draws from categorical laws given by logits: by inverse CDF, and without replacement by Gumbel keys that are drawn lazily."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
    cdf = (logits - logits.amax(-1, keepdim=True)).double().exp_().cumsum(-1)
    total = cdf[:, -1:]
    below = torch.nextafter(total, torch.zeros_like(total))
    return torch.searchsorted(cdf, torch.minimum(uniform.to(cdf.device) * total, below), right=True).cpu()


class Block:
    """The race of Gumbel keys in R rows: one key for each of the `size` likeliest tokens, and a stream of keys for all others together.

    Key = logit + Gumbel noise = -log of the time at which an exponential clock of rate exp(logit) rings. The others share one clock of the sum of their
    rates, and which of them it was is drawn when it matters. Everything here is on the CPU but the rows themselves.

    Attributes:
        values: float64 [R, S], the logits of the likeliest tokens. ids: int64 [R, S], which they are.
        log_rest: float64 [R], logsumexp of the logits of the others, -inf where there are none.
        log_norm: float64 [R], logsumexp of all.
        turns: [R, 2 S] (greedy: [R, S]), who comes, in order: i < S for likely token i, S + n for the n-th key of the others.
    """

    def __init__(self, logits: torch.Tensor, size: int, generator: Generators, greedy: bool):
        rows, width = logits.shape
        self.size = min(size, width)
        values, ids = logits.topk(min(self.size + 1, width))  # one more: the likeliest of the others
        next_, (values, ids) = values[:, self.size :], (values[:, : self.size], ids[:, : self.size])
        self.log_rest = _log_rest(logits, next_, ids).cpu()
        self.values, self.ids = values.double().cpu(), ids.cpu()
        self.log_norm = torch.logaddexp(self.values.logsumexp(-1), self.log_rest)
        if greedy:
            self.turns = torch.arange(self.size).expand(rows, -1)
            return
        waits = -torch.log1p(-uniforms(rows, 2 * self.size, generator))
        waits[:, self.size :] = waits[:, self.size :].cumsum(-1)
        rates = torch.cat([self.values, self.log_rest[:, None].expand(-1, self.size)], -1)
        self.turns = (rates - waits.log()).argsort(-1, descending=True)


class LazyOrder:
    """The tokens of one row in the order of draws without replacement from softmax(logits). Iterate over it once.

    Where a block is used up, the race begins anew among the tokens that have not come, with a block four times as large: clocks have no memory, so
    the law of the order is that of one race among all (Plackett-Luce), whatever was drawn so far.

    Args:
        logits: [1, V] float32 or float64, on any device; tokens at -inf never come.
        block, row: the first block, and the row's place in it.
        generator: the row's, on the CPU.
        greedy: descending logits instead.

    Attributes:
        tokens, log_probabilities: those that have come.
    """

    def __init__(self, logits: torch.Tensor, block: Block, row: int, generator: torch.Generator, greedy: bool = False):
        self._logits, self._first, self._row, self._generator, self._greedy = logits, block, row, generator, greedy
        self._log_norm = float(block.log_norm[row])
        self._places: list[int] | None = []
        self.tokens: list[int] = []
        self.log_probabilities: list[float] = []

    def __iter__(self) -> Iterator[int]:
        block, row = self._first, self._row
        yield from self._race(block, row)
        while block.log_rest[row] > -torch.inf:
            self._places = None
            block, row = Block(self._remaining(), GROWTH * block.size, self._generator, self._greedy), 0
            yield from self._race(block, row)

    def _race(self, block: Block, row: int) -> Iterator[int]:
        values, ids = block.values[row].tolist(), block.ids[row].tolist()
        others, came = None, set()
        for turn in block.turns[row].tolist():
            if turn < block.size:
                if values[turn] == -torch.inf:
                    return
                if self._places is not None:
                    self._places.append(turn)
                yield self._come(ids[turn], values[turn])
            elif block.log_rest[row] == -torch.inf:
                return
            else:
                if others is None:
                    others = self._draw_others(block, row)
                    self._places = None
                token = others[turn - block.size]
                if token not in came:
                    came.add(token)
                    yield self._come(token, float(self._logits[0, token]))
                if turn == 2 * block.size - 1:
                    return  # what the others do after their last key is not known

    def _come(self, token: int, logit: float) -> int:
        self.tokens.append(token)
        self.log_probabilities.append(logit - self._log_norm)
        return token

    def _draw_others(self, block: Block, row: int) -> list[int]:
        likely = torch.cat([block.ids[row], torch.tensor(self.tokens, dtype=torch.int64)]).to(self._logits.device)
        others = self._logits.index_fill(1, likely, -torch.inf)
        return sample(others, uniforms(1, block.size, self._generator))[0].tolist()

    def log_remaining(self) -> float:
        """log of the probability of all tokens that have not come."""
        if self._places is None:
            left = self._remaining().double().logsumexp(-1)[0]
        else:
            values = self._first.values[self._row].clone()
            values[self._places] = -torch.inf
            left = torch.logaddexp(values.logsumexp(-1), self._first.log_rest[self._row])
        return float(left) - self._log_norm

    def _remaining(self) -> torch.Tensor:
        return self._logits.index_fill(1, torch.tensor(self.tokens, device=self._logits.device), -torch.inf)


def _log_rest(logits: torch.Tensor, largest: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """logsumexp [R] of the logits that are not at `ids` [R, S], of which `largest` [R, 1] is the largest, [R, 0] where there is none.

    By a sum of its own, never by a difference, and scaled by the largest, so that no gap to the likeliest makes the others vanish.
    """
    if not largest.shape[1]:
        return torch.full((len(logits),), -torch.inf, dtype=torch.float64, device=logits.device)
    anchor = torch.where(largest.isfinite(), largest, 0.0)
    others = (logits - anchor).clamp_(max=0.0).exp_().scatter_(1, ids, 0.0)
    return anchor[:, 0].double() + others.sum(-1, dtype=torch.float64).log()
