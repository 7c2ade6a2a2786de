"""How sparsity is shared among projections: as the user names them, or greedily inside a block."""

import difflib
import fnmatch
import math
import numbers
from collections.abc import Callable, Mapping, Sequence

STEP = 0.05
HIGHEST = 0.95

Sparsity = float | Mapping[str, float]


def checked(sparsity: Sparsity) -> Sparsity:
    """`sparsity` with its numbers as floats.

    Raises:
        TypeError, ValueError: it is no number in [0, 1), nor a mapping from names to such numbers.
    """
    if isinstance(sparsity, Mapping):
        if not sparsity:
            raise ValueError("sparsity is an empty mapping: name at least one module")
        for name in sparsity:
            if not isinstance(name, str):
                raise TypeError(f"sparsity maps module names to numbers, got the name {name!r}")
        return {name: _checked_number(f"sparsity[{name!r}]", value) for name, value in sparsity.items()}
    return _checked_number("sparsity", sparsity)


def _checked_number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number in [0, 1), got {value!r}")
    if math.isnan(value) or not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}")
    return float(value)


def spread(sparsity: Sparsity, names: Sequence[str]) -> dict[str, float]:
    """One sparsity per name, from one number or from a mapping of names, endings of names, or fnmatch patterns; the
    last match counts.

    Raises:
        ValueError: a pattern that matches nothing; the nearest name is suggested.
    """
    if not isinstance(sparsity, Mapping):
        return dict.fromkeys(names, sparsity)
    result = dict.fromkeys(names, 0.0)
    for pattern, value in sparsity.items():
        matching = [
            name
            for name in names
            if name == pattern or name.endswith(f".{pattern}") or fnmatch.fnmatchcase(name, pattern)
        ]
        if not matching:
            endings = dict.fromkeys(ending for name in names for ending in (name, name.rsplit(".", 1)[-1]))
            nearest = difflib.get_close_matches(pattern, endings, n=1, cutoff=0)
            hint = f"; the nearest name is {nearest[0]!r}" if nearest else ""
            raise ValueError(f"sparsity names {pattern!r}, which is no module that can be made sparse here{hint}")
        result |= dict.fromkeys(matching, value)
    return result


def greedy(
    sizes: Mapping[str, int], error: Callable[[dict[str, float]], float], target: float, step: float = STEP
) -> dict[str, float]:
    """Greedy allocation inside one block (TEAL, Liu et al. 2024, arXiv 2408.14690, algorithm 1).

    From zero, again and again the projection whose next step costs the block's output least is made sparser, until the
    block skips a fraction `target` of its weights. A step skips the same number of weights in whichever projection
    takes it, so that small projections take larger steps.

    Args:
        sizes: weights per projection (the real parameter counts).
        error: the error of the block's output at given sparsities.
        target: fraction of the block's weights to skip, in [0, HIGHEST].
        step: the weights of one step, as a fraction of the mean projection.

    Returns:
        sparsity per projection, each at most HIGHEST; sum(size * sparsity) / sum(size) equals `target`.

    Raises:
        ValueError: target outside [0, HIGHEST].
    """
    if not 0 <= target <= HIGHEST:
        raise ValueError(f"greedy allocation reaches sparsities in [0, {HIGHEST}], got {target}")
    sparsity = dict.fromkeys(sizes, 0.0)
    remaining = target * sum(sizes.values())
    quantum = step * sum(sizes.values()) / len(sizes)
    while remaining > 1e-6 * quantum:
        trials = {}
        for name, size in sizes.items():
            taken = min(quantum, remaining, (HIGHEST - sparsity[name]) * size)
            if taken > 1e-6 * quantum:
                trial = sparsity | {name: sparsity[name] + taken / size}
                trials[name] = (error(trial), taken, trial)
        _, taken, sparsity = min(trials.values(), key=lambda trial: trial[0])
        remaining -= taken
    return sparsity
