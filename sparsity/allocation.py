"""How a block's sparsity is shared among its projections."""

from collections.abc import Callable, Mapping

STEP = 0.05
HIGHEST = 0.95


def greedy(
    sizes: Mapping[str, int], error: Callable[[dict[str, float]], float], target: float, step: float = STEP
) -> dict[str, float]:
    """Greedy allocation inside one block (TEAL, Liu et al. 2024, arXiv 2408.14690, algorithm 1).

    From zero, again and again the projection whose next step costs the block's output least is made sparser, until the block skips a fraction
    `target` of its weights. A step skips the same number of weights in whichever projection takes it, so that small projections take larger steps.

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
