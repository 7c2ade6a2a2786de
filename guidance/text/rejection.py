"""Adaptive weighted rejection sampling (AWRS): exact draws from a constrained next-token law, with unbiased weights.

The law p of the next token is restricted to the tokens that a check v(x) in {0, 1} accepts. Tokens are drawn without
replacement and checked one by one; the first that is accepted is an exact draw from p(x) v(x) / Z, where Z = sum_x p(x)
v(x). A few checks more give a weight w with E[w * 1{x = t}] = p(t) v(t) for every token t, hence E[w] = Z.

Source: Lipkin et al., "Fast Controlled Generation from Language Models with Adaptive Weighted Rejection Sampling"
(2025), its recursive estimator in closed form: with x_1, x_2, ... in the order of the draws, k the first that is
accepted and R_j = sum_{i >= j} p(x_i),

    w = p(x_k) + R_{k+1} v(x_{k+1})

since given all draws up to k the untested valid mass is Z - p(x_k), and the draw after it estimates that without bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from hasten.guidance.inverse_cdf import Generators, uniforms
from hasten.guidance.text import bitmask
from hasten.guidance.text.categorical import FIRST_SIZE, GumbelRace, LazyOrder, sample

End = Literal["accepted", "no_support", "budget_spent"]

MASK_AFTER = 16


@dataclass(frozen=True, slots=True)
class Draw:
    """One token for each of R rows.

    token: int64 [R], -1 where there is none.
    log_weight: float64 [R], -inf where there is no token.
    checks: int64 [R], calls of `is_valid`.
    masked: bool [R], whether a mask took over.
    end: R of "accepted", "no_support" (no token of positive probability is valid) and "budget_spent" (max_checks tokens
        were checked and none was valid; others may be).
    """

    token: torch.Tensor
    log_weight: torch.Tensor
    checks: torch.Tensor
    masked: torch.Tensor
    end: tuple[End, ...]


@dataclass(frozen=True, slots=True)
class Walk:
    """The tokens that were checked, in order, what the checks said, and why the walk ended."""

    tokens: list[int]
    valid: list[bool]
    end: End | Literal["mask"]


def walk(
    order: Iterable[int],
    is_valid: Callable[[int], bool],
    max_checks: int | None = None,
    extra_checks: int = 0,
    mask_after: int | None = None,
) -> Walk:
    """Checks tokens in the order of their draws: up to the first valid one, then 1 + extra_checks more.

    Never checks more than max_checks. Ends with "mask" when mask_after tokens were refused in a row from the start.
    """
    tokens: list[int] = []
    valid: list[bool] = []
    if mask_after == 0:
        return Walk(tokens, valid, "mask")
    wanted = None
    for token in order:
        tokens.append(token)
        valid.append(bool(is_valid(token)))
        if wanted is not None:
            wanted -= 1
        elif valid[-1]:
            wanted = 1 + extra_checks
        elif len(tokens) == mask_after:
            return Walk(tokens, valid, "mask")
        if wanted == 0 or len(tokens) == max_checks:
            break
    else:
        return Walk(tokens, valid, "no_support" if wanted is None else "accepted")
    return Walk(tokens, valid, "budget_spent" if wanted is None else "accepted")


def weight(probabilities: Sequence, valid: Sequence[bool], untested):
    """The weight of a walk that found a valid token: the valid mass, and all that is untested if its last token is
    valid.

    With one token after the first valid one this is the closed form above; where max_checks left none after it, it is
    R_k; with more of them it is the last of Des Raj's estimates (1956), exact when nothing is left untested.

    Args:
        probabilities: p of the tested tokens in their order; any numbers, fractions too.
        valid: what the checks said.
        untested: the mass of all tokens that were not tested.
    """
    found = sum(p for p, accepted in zip(probabilities, valid, strict=True) if accepted)
    return found + untested if valid[-1] else found


FillMask = Callable[[np.ndarray], object]


def draw(
    logits: torch.Tensor,
    is_valid: Callable[[int, int], bool] | None,
    *,
    generator: Generators,
    max_checks: int | None = None,
    extra_checks: int = 0,
    fill_masks: Sequence[FillMask | None] | None = None,
    mask_after: int | Sequence[int] = MASK_AFTER,
    greedy: bool = False,
) -> Draw:
    """Draws one token per row from softmax(logits) restricted to valid tokens, with a proper weight.

    Args:
        logits: [R, V], any float dtype and device; -inf for tokens outside the law.
        is_valid: `is_valid(row, token)`, the check. None: every token is valid, and the log weight is 0.
        generator: on the CPU; one for all rows, or R of them (the same object may stand for several rows).
        max_checks: at most so many checks a row. The weight stays unbiased; a row without a valid token among them has
            weight 0.
        extra_checks: so many checks beyond the one that the closed form needs; they lower the variance of the weight.
        fill_masks: for each row a function that adds every valid token to an empty mask (`bitmask`, [ceil(V / 32)]), or
            None where nothing can. It must agree with `is_valid`.
        mask_after: so many refused tokens before the row's mask takes over, and the weight is exact: log_weight = log
            Z. A sequence: one for each row; chosen by what was drawn before, they leave the weights unbiased.
        greedy: the likeliest valid token instead of a draw (temperature 0). There is no law, and log_weight is NaN.

    Returns:
        A `Draw`. A refused token is never returned.

    Raises:
        ValueError: logits of another shape or dtype, with NaN or +inf; counts that are too small; another number of
            fill_masks than rows.
    """
    _check(logits, generator, max_checks, extra_checks, mask_after, fill_masks)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    rows = len(logits)
    if rows == 0:
        return _collect([], logits.device)
    if is_valid is None:
        return _unconstrained(logits, generator, greedy)
    generators = [generator] * rows if isinstance(generator, torch.Generator) else generator
    fillers = [None] * rows if fill_masks is None else fill_masks
    patience = [mask_after] * rows if isinstance(mask_after, int) else mask_after
    patience = [None if filler is None else after for filler, after in zip(fillers, patience, strict=True)]
    walking = [row for row in range(rows) if patience[row] != 0]
    drawn = [_Row() for _ in range(rows)]
    log_norm = np.empty(rows)
    if walking:
        every = len(walking) == rows
        walked_logits = logits if every else logits[walking]
        own = generator if every else [generators[row] for row in walking]
        race = GumbelRace(walked_logits, FIRST_SIZE, own, greedy)
        log_norm[walking] = race.log_norm
    if len(walking) < rows:
        others = [row for row in range(rows) if patience[row] == 0]
        log_norm[others] = _log_norm(logits[others])
    _refuse_bad_norm(log_norm)
    for place, row in enumerate(walking):
        order = LazyOrder(walked_logits[place : place + 1], race, place, generators[row], greedy)
        walked = walk(order, lambda token, row=row: is_valid(row, token), max_checks, extra_checks, patience[row])
        drawn[row] = _Row.of(walked, order, greedy)
    for row in range(rows):
        if drawn[row].masked:
            _draw_by_mask(drawn[row], logits[row], log_norm[row], fillers[row], generators[row], greedy)
    return _collect(drawn, logits.device)


@dataclass(slots=True)
class _Row:
    """One row of a `Draw`; as it stands, one that its mask has to draw."""

    token: int = -1
    log_weight: float = -math.inf
    checks: int = 0
    end: End = "no_support"
    masked: bool = True

    @classmethod
    def of(cls, walked: Walk, order: LazyOrder, greedy: bool) -> _Row:
        checks = len(walked.tokens)
        if walked.end == "mask":
            return cls(checks=checks)
        if walked.end != "accepted":
            return cls(checks=checks, end=walked.end, masked=False)
        token = walked.tokens[walked.valid.index(True)]
        log_weight = math.nan if greedy else log_weight_of(order, walked.valid)
        return cls(token, log_weight, checks, "accepted", masked=False)


def log_weight_of(order: LazyOrder, valid: Sequence[bool]) -> float:
    """log of `weight` for the tokens that have come, scaled so that no mass is too small for float64."""
    untested = order.log_remaining()
    valid_logs = [log_p for log_p, accepted in zip(order.log_probabilities, valid, strict=True) if accepted]
    scale = max([*valid_logs, untested] if valid[-1] else valid_logs)
    scaled = [math.exp(min(log_p - scale, 0.0)) for log_p in order.log_probabilities]
    return scale + math.log(weight(scaled, valid, math.exp(min(untested - scale, 0.0))))


def _draw_by_mask(
    row: _Row,
    logits: torch.Tensor,
    log_norm: float,
    fill_mask: FillMask,
    generator: torch.Generator,
    greedy: bool,
) -> None:
    """Makes a row with logits [V] a draw among all tokens that its mask allows; the weight is Z.

    Given the tokens that were refused, the first valid one of the order has the law p v / Z, and so has a fresh draw
    from it.
    """
    mask = bitmask.allocate(len(logits))
    fill_mask(mask)
    ids = torch.from_numpy(bitmask.members(mask, len(logits)))
    allowed = logits[ids.to(logits.device)].double()
    log_mass = float(allowed.logsumexp(-1)) - log_norm if len(ids) else -math.inf
    if log_mass > -math.inf:
        row.token, row.end = int(ids[_pick(allowed[None], generator, greedy)]), "accepted"
        row.log_weight = math.nan if greedy else log_mass


def _log_norm(logits: torch.Tensor) -> np.ndarray:
    """logsumexp of each row, float64 [R]."""
    top = logits.amax(-1, keepdim=True)
    top.masked_fill_(top == -torch.inf, 0.0)
    return (top[:, 0].double() + (logits - top).exp_().sum(-1, dtype=torch.float64).log()).cpu().numpy()


def _pick(logits: torch.Tensor, generator: Generators, greedy: bool) -> torch.Tensor:
    if greedy:
        return logits.argmax(-1).cpu()
    return sample(logits, uniforms(len(logits), 1, generator))[:, 0]


def _unconstrained(logits: torch.Tensor, generator: Generators, greedy: bool) -> Draw:
    top = logits.amax(-1).cpu()
    _refuse_bad_norm(top.double().numpy())
    living = top > -torch.inf
    tokens = torch.full((len(logits),), -1)
    if living.any():
        kept = living.nonzero()[:, 0]
        own = generator if isinstance(generator, torch.Generator) else [generator[row] for row in kept.tolist()]
        tokens[kept] = _pick(logits[kept.to(logits.device)], own, greedy)
    log_weight = torch.zeros(len(logits), dtype=torch.float64).masked_fill_(~living, -torch.inf)
    if greedy:
        log_weight[living] = torch.nan
    none = torch.zeros(len(logits), dtype=torch.int64)
    end = tuple("accepted" if alive else "no_support" for alive in living.tolist())
    device = logits.device
    return Draw(tokens.to(device), log_weight.to(device), none.to(device), none.bool().to(device), end)


def _collect(rows: list[_Row], device: torch.device) -> Draw:
    return Draw(
        torch.tensor([row.token for row in rows], dtype=torch.int64, device=device),
        torch.tensor([row.log_weight for row in rows], dtype=torch.float64, device=device),
        torch.tensor([row.checks for row in rows], dtype=torch.int64, device=device),
        torch.tensor([row.masked for row in rows], dtype=torch.bool, device=device),
        tuple(row.end for row in rows),
    )


def _refuse_bad_norm(norm: np.ndarray) -> None:
    bad = np.flatnonzero(np.isnan(norm) | (norm == np.inf)).tolist()
    if bad:
        raise ValueError(f"logits must be finite or -inf, row {bad[0]} holds NaN or +inf")


def _check(logits, generator, max_checks, extra_checks, mask_after, fill_masks) -> None:
    if logits.dim() != 2 or not logits.is_floating_point() or logits.shape[1] == 0:
        raise ValueError(f"logits must be floats [R, V] with V > 0, got {logits.dtype} {list(logits.shape)}")
    if max_checks is not None and max_checks < 1:
        raise ValueError(f"max_checks must be 1 or more, or None, got {max_checks}")
    if extra_checks < 0:
        raise ValueError(f"extra_checks must be 0 or more, got {extra_checks}")
    after = [mask_after] if isinstance(mask_after, int) else mask_after
    if min(after, default=0) < 0:
        raise ValueError(f"mask_after must be 0 or more, got {min(after)}")
    if not isinstance(mask_after, int) and len(mask_after) != len(logits):
        raise ValueError(f"mask_after must be one, or one per row: got {len(mask_after)} for {len(logits)} rows")
    if not isinstance(generator, torch.Generator) and len(generator) != len(logits):
        raise ValueError(f"generator must be one, or one per row: got {len(generator)} for {len(logits)} rows")
    if fill_masks is not None and len(fill_masks) != len(logits):
        raise ValueError(f"fill_masks must be one per row, got {len(fill_masks)} for {len(logits)} rows")
