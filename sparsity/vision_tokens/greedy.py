"""G-Search: the fewest image tokens of every layer that keep a metric within a tolerance."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hasten.sparsity.vision_tokens.evaluations import Evaluations, Shares
from hasten.sparsity.vision_tokens.schedules import FIRST, Stages


@dataclass(frozen=True, slots=True)
class Searched:
    """What `g_search` found.

    Args:
        shares: of the image tokens that each layer sees.
        metric: under these shares. full: under ones.
        evaluations: how many were made; those that were known are not among them.
        sweep: how many it would take to try each level at each layer that is searched.
        history: every schedule that was asked for, in order, with its metric, known or not.
    """

    shares: Shares
    metric: float
    full: float
    evaluations: int
    sweep: int
    history: tuple[tuple[Shares, float], ...]

    @property
    def schedule(self) -> Stages:
        """The layers at which shares fall; all tokens from the second layer on where none does."""
        falls = {
            layer: after for layer, (before, after) in enumerate(itertools.pairwise(self.shares), 1) if after < before
        }
        return Stages(falls or {FIRST: 1.0})


def grid(levels: int, least: float = 1 / 64) -> tuple[float, ...]:
    """`levels` shares from 1 to `least`, each the same fraction of the one before.

    Equal ratios, since what matters of a share is by how much it shrinks the work that is left: an even grid has nine
    tenths of its levels above a tenth, where little is gained, and one below 1 / levels.

    Raises:
        ValueError: fewer than 2 levels, or `least` outside (0, 1).
    """
    if isinstance(levels, bool) or not isinstance(levels, int) or levels < 2:
        raise ValueError(f"levels must be an integer of at least 2, got {levels!r}")
    if not 0 < least < 1:
        raise ValueError(f"least must be in (0, 1), got {least!r}")
    return (1.0, *(least ** (level / (levels - 1)) for level in range(1, levels - 1)), float(least))


def g_search(
    evaluate: Callable[[Shares], float],
    layers: int,
    *,
    tolerance: float,
    levels: int | Sequence[float] = 16,
    start: int = FIRST,
    stages: Sequence[int] | None = None,
    full: float | None = None,
    known: Mapping[Shares, float] | None = None,
    on_evaluation: Callable[[Shares, float], None] | None = None,
) -> Searched:
    """Greedy search from shallow to deep (G-Search, arXiv 2412.00556; its code is not public, and this follows the
    abstract).

    Layer by layer, the least share is taken at which the metric stays within `tolerance` of the full one while this
    layer and all deeper ones keep that share; by bisection, which takes the metric to fall with the shares. If deeper
    layers need no more tokens than shallower ones do, and a layer's need does not depend on what others keep above
    theirs, no schedule of the grid with smaller shares is within the tolerance.

    Args:
        evaluate: the metric under the shares of all layers; greater is better.
        layers: of the decoder.
        tolerance: by how much the metric may fall, at least 0.
        levels: the grid of shares: how many, as `grid` makes them, or the shares themselves in (0, 1].
        start: the first layer that may see fewer tokens, at least 1.
        stages: the layers at which shares may fall, rising and from `start` on. Layers between them are not searched.
            All from `start` on where None.
        full: the metric without pruning. It is evaluated where None.
        known, on_evaluation: as in `Evaluations`. A search with what an earlier one evaluated goes on where that ended.

    Raises:
        ValueError: a layer, level or tolerance outside these bounds, or a metric that is NaN.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance!r}")
    stages = range(start, layers) if stages is None else stages
    if not stages or start < FIRST or any(not start <= stage < layers for stage in stages):
        raise ValueError(f"stages must be layers from {max(start, FIRST)} to {layers - 1}, got {list(stages)}")
    if any(after <= before for before, after in itertools.pairwise(stages)):
        raise ValueError(f"stages must rise, got {list(stages)}")
    shares_tried = grid(levels) if isinstance(levels, int) else sorted({1.0, *map(float, levels)}, reverse=True)
    if not all(0 < share <= 1 for share in shares_tried):
        raise ValueError(f"levels must be in (0, 1], got {list(levels)}")

    evaluations = Evaluations(evaluate, known, on_evaluation)
    best = (1.0,) * layers
    full = evaluations(best) if full is None else full
    metric, level = full, 0
    for stage in stages:
        reached, beyond = level, len(shares_tried)
        while reached + 1 < beyond:
            middle = (reached + beyond) // 2
            trial = best[:stage] + (shares_tried[middle],) * (layers - stage)
            value = evaluations(trial)
            if value >= full - tolerance:
                best, metric, reached = trial, value, middle
            else:
                beyond = middle
        level = reached
    return Searched(
        shares=best,
        metric=metric,
        full=full,
        evaluations=evaluations.made,
        sweep=len(stages) * len(shares_tried),
        history=tuple(evaluations.asked.items()),
    )
