"""P-Sigmoid: the sigmoid of depth that serves a metric best under a budget."""

import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from hasten.sparsity.vision_tokens.evaluations import Evaluations, Shares
from hasten.sparsity.vision_tokens.schedules import FIRST, LEAST, PSigmoid, Schedule, crossing

STEEPEST, HIGHEST_FLOOR = 50.0, 0.3  # steepness is searched in [1, 50] on a logarithmic axis
CANDIDATES = 1024  # points of the square among which the expected improvement is highest
INITIAL = 5  # points that are spread evenly, before a Gaussian process is fitted to them

Point = tuple[float, float]  # of the unit square: log steepness, and floor


@dataclass(frozen=True, slots=True)
class Fitted:
    """What `p_sigmoid_search` found.

    Args:
        schedule: the best, with its `shares` and its `metric`.
        method: "gp" or "sobol", whichever was used.
        evaluations: how many were made; those that were known, or asked for twice, are not among them.
        history: every sigmoid that was asked for, in order, with its metric.
    """

    schedule: PSigmoid
    shares: Shares
    metric: float
    method: str
    evaluations: int
    history: tuple[tuple[PSigmoid, float], ...]


def p_sigmoid_search(
    evaluate: Callable[[Shares], float],
    layers: int,
    budget: float,
    *,
    evaluations: int,
    seed: int,
    first: Schedule | None = None,
    start: int = FIRST,
    levels: int = 6,
    cost: Callable[[Shares], float] | None = None,
    method: Literal["auto", "gp", "sobol"] = "auto",
    known: Mapping[Shares, float] | None = None,
    on_evaluation: Callable[[Shares, float], None] | None = None,
) -> Fitted:
    """The best `PSigmoid` of a cost (P-Sigmoid, arXiv 2412.00556; a reconstruction, see there).

    Steepness and floor are searched; the middle follows from the budget (`PSigmoid.within`). With method "gp", a
    Gaussian process is fitted to what is known, and the point of the highest expected improvement is next; with
    "sobol", half of the points are spread evenly and the others lie about the best one, nearer after each that does not
    improve on it. The same arguments give the same points.

    Args:
        evaluate: the metric under the shares of all layers; greater is better.
        layers: of the decoder.
        budget: in (0, 1]: the mean share, or what `cost` may come to. No schedule that is tried exceeds it.
        evaluations: how many schedules to ask for, at least 1, `first` among them.
        seed: of the points.
        first: a schedule, such as that of G-Search: the sigmoid that is nearest to it is asked for first.
        start: the first layer that may see fewer tokens, at least 1.
        levels: the most stages, as in `PSigmoid`.
        cost: as in `PSigmoid.within`.
        method: "auto" is "gp" where scikit-learn is installed, else "sobol".
        known, on_evaluation: as in `Evaluations`.

    Raises:
        ValueError: an unknown method, no evaluations, a budget that no sigmoid meets, or a metric that is NaN.
        ImportError: method "gp" without scikit-learn.
    """
    if method not in ("auto", "gp", "sobol"):
        raise ValueError(f'method must be "auto", "gp" or "sobol", got {method!r}')
    if isinstance(evaluations, bool) or not isinstance(evaluations, int) or evaluations < 1:
        raise ValueError(f"evaluations must be an integer of at least 1, got {evaluations!r}")
    available = importlib.util.find_spec("sklearn") is not None
    if method == "gp" and not available:
        raise ImportError('method "gp" needs scikit-learn: pip install "hasten[search]", or take method "sobol"')
    method = ("gp" if available else "sobol") if method == "auto" else method

    PSigmoid.within(budget, STEEPEST, 0.0, layers, levels, start, cost)  # the budget is one that can be met
    highest_floor = _highest_floor(budget, layers, start, cost)
    memory = Evaluations(evaluate, known, on_evaluation)
    points: list[Point] = []
    history: list[tuple[PSigmoid, float]] = []
    proposals = (_gaussian_process if method == "gp" else _sobol)(points, history, evaluations, seed)
    while len(history) < evaluations:
        if first is not None and not points:
            point = _nearest(first.shares(layers), start, highest_floor)
        else:
            point = next(proposals)
        given = PSigmoid.within(budget, STEEPEST ** point[0], point[1] * highest_floor, layers, levels, start, cost)
        points.append(point)
        history.append((given, memory(given.shares(layers))))
    best, metric = max(history, key=lambda entry: entry[1])
    return Fitted(best, best.shares(layers), metric, method, memory.made, tuple(history))


def _highest_floor(budget: float, layers: int, start: int, cost: Callable[[Shares], float] | None) -> float:
    """The highest floor, up to HIGHEST_FLOOR, at which the budget can be met, if only by layers that see no more."""

    def least(floor: float) -> float:
        shares = (1.0,) * start + (max(LEAST, floor),) * (layers - start)
        return math.fsum(shares) / layers if cost is None else cost(shares)

    return crossing(least, budget, 0.0, min(HIGHEST_FLOOR, budget)) * (1 - 1e-9)  # a mean of equal shares may round up


def _nearest(shares: Shares, start: int, highest_floor: float) -> Point:
    """Steepness and floor of the sigmoid at the least squared distance from `shares`, whatever it costs: over a grid of
    steepness and middle, with the best floor of each, in which a sigmoid is linear."""
    depth = np.arange(start, len(shares)) / len(shares)
    wanted = np.asarray(shares[start:])
    axis, middle = np.linspace(0, 1, 65), np.linspace(-0.5, 1.5, 129)
    falling = 1 / (1 + np.exp(STEEPEST ** axis[:, None, None] * (depth - middle[:, None])))  # [steepness, middle, L]
    rest = 1 - falling
    floor = ((wanted - falling) * rest).sum(-1) / np.maximum((rest * rest).sum(-1), 1e-12)
    floor = floor.clip(0, highest_floor)
    distance = ((falling + floor[..., None] * rest - wanted) ** 2).sum(-1)
    row, column = np.unravel_index(distance.argmin(), distance.shape)
    return float(axis[row]), float(floor[row, column] / highest_floor) if highest_floor else 0.0


def _spread(seed: int) -> torch.quasirandom.SobolEngine:
    return torch.quasirandom.SobolEngine(2, scramble=True, seed=seed)


def _sobol(points: list[Point], history: list[tuple[PSigmoid, float]], evaluations: int, seed: int) -> Iterator[Point]:
    """The next point, again and again, given `points` and `history`, which the caller adds to in between."""
    engine = _spread(seed)
    while 2 * len(points) < evaluations:
        yield tuple(engine.draw(1)[0].tolist())
    radius = 0.25
    while True:
        metrics = [metric for _, metric in history]
        best = max(range(len(points)), key=metrics.__getitem__)
        near = engine.draw(1)[0] * 2 - 1
        yield tuple((torch.tensor(points[best]) + radius * near).clamp(0, 1).tolist())
        if history[-1][1] <= metrics[best]:
            radius *= 0.8


def _gaussian_process(
    points: list[Point], history: list[tuple[PSigmoid, float]], evaluations: int, seed: int
) -> Iterator[Point]:
    """As `_sobol`, by the expected improvement of a Gaussian process with a Matern 5/2 kernel."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
    from threadpoolctl import threadpool_limits

    engine = _spread(seed)
    while len(points) < min(INITIAL, evaluations):
        yield tuple(engine.draw(1)[0].tolist())
    kernel = ConstantKernel() * Matern([0.5, 0.5], (0.05, 5.0), nu=2.5) + WhiteKernel(1e-2, (1e-6, 1.0))
    while True:
        metrics = np.array([metric for _, metric in history])
        process = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=2, random_state=seed)
        with threadpool_limits(1, "blas"), warnings.catch_warnings():  # threads cost more than matrices this small
            # A length scale at its bound says only that the metric does not depend on that axis.
            warnings.simplefilter("ignore", ConvergenceWarning)
            process.fit(np.array(points), metrics)
        process.kernel_ = process.kernel_.k1  # so that deviations are those of the metric without its noise
        candidates = engine.draw(CANDIDATES).double().numpy()
        mean, deviation = process.predict(candidates, return_std=True)
        yield tuple(candidates[_expected_improvement(mean, deviation, metrics.max()).argmax()].tolist())


def _expected_improvement(mean: np.ndarray, deviation: np.ndarray, best: float) -> np.ndarray:
    """E[max(0, f - best)] of normal f (Jones et al. 1998, equation 15)."""
    deviation = np.maximum(deviation, 1e-12)
    score = torch.from_numpy((mean - best) / deviation)
    normal = torch.distributions.Normal(0.0, 1.0)
    return deviation * (score * normal.cdf(score) + normal.log_prob(score).exp()).numpy()
