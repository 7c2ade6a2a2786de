"""Evaluations of schedules by a metric of the caller's, each made once."""

import math
from collections.abc import Callable, Mapping

Shares = tuple[float, ...]


class Evaluations:
    """`evaluate` with a memory.

    Args:
        evaluate: a metric of the model under these shares of all layers; greater is better.
        known: what earlier evaluations gave, which are not made again.
        on_evaluation: called with the shares and the metric after each evaluation that is made, so that a caller can
            save it.

    Attributes:
        asked: what was asked so far, in order and once each, with the answers; also what was known.
        made: how often `evaluate` ran.
    """

    def __init__(
        self,
        evaluate: Callable[[Shares], float],
        known: Mapping[Shares, float] | None = None,
        on_evaluation: Callable[[Shares, float], None] | None = None,
    ):
        self.evaluate, self.on_evaluation = evaluate, on_evaluation
        self.known = {tuple(shares): float(metric) for shares, metric in (known or {}).items()}
        self.asked: dict[Shares, float] = {}
        self.made = 0

    def __call__(self, shares: Shares) -> float:
        """The metric under `shares`.

        Raises:
            ValueError: `evaluate` returned NaN.
        """
        if shares not in self.known:
            metric = float(self.evaluate(shares))
            self.made += 1
            if math.isnan(metric):
                raise ValueError(f"evaluate must return a number, got NaN for the shares {shares}")
            self.known[shares] = metric
            if self.on_evaluation is not None:
                self.on_evaluation(shares, metric)
        self.asked[shares] = self.known[shares]
        return self.known[shares]
