"""What a user asks for: frozen dataclasses whose fields are their whole configuration. How they are carried out is in `hasten.acceleration.bind`."""

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from hasten.sparsity.allocation import HIGHEST

Sparsity = float | Mapping[str, float]


@dataclass(frozen=True, slots=True)
class DenseDecode:
    """Exact: decode products (one token, batch 1 to 8) by hasten's dense kernel, wherever it measures faster than torch on this machine.

    Args:
        always: use the kernel everywhere, measured faster or not.
    """

    always: bool = False

    def __post_init__(self):
        _check_flag("always", self.always)


@dataclass(frozen=True, slots=True)
class InputSparsity:
    """What `Wina` and `Teal` share: in decode, inputs of a projection whose score is small are skipped; thresholds come from calibration, prefill
    stays dense, and what is left dense (the head, projections at sparsity 0) is decoded as `DenseDecode` does.

    Args:
        sparsity: the fraction of inputs to skip, in [0, 1), on average over the calibration tokens; or a mapping from module names, their endings
            or fnmatch patterns to fractions, where what is not named stays dense.
        allocation: "uniform" gives every projection the same sparsity; "greedy" shares each block's budget where it costs the block's output least.
    """

    sparsity: Sparsity = 0.5
    allocation: Literal["uniform", "greedy"] = "uniform"

    def __post_init__(self):
        _check_allocation(self.sparsity, self.allocation)
        object.__setattr__(self, "sparsity", _checked_sparsity(self.sparsity))


@dataclass(frozen=True, slots=True)
class Wina(InputSparsity):
    """Weight-informed activation sparsity (Chen et al. 2025, arXiv 2505.19427): input j scores |x_j| * ||W[:, j]||_2, with the true column norms of
    every projection.

    Args:
        sparsity, allocation: as in `InputSparsity`.
    """


@dataclass(frozen=True, slots=True)
class Teal(InputSparsity):
    """Activation sparsity by magnitude (Liu et al. 2024, arXiv 2408.14690): input j scores |x_j|.

    Args:
        sparsity, allocation: as in `InputSparsity`.
    """


@dataclass(frozen=True, slots=True)
class Cats:
    """Contextually aware thresholding (Lee et al. 2024, arXiv 2404.08763) of gated MLPs: in decode, a neuron whose |act(gate)| is small is skipped
    in the up and down projections. Gate and attention stay dense (as in `DenseDecode`).

    Args:
        sparsity: the fraction of an MLP's neurons to skip, in [0, 1); or a mapping from names of MLPs, their endings or fnmatch patterns.
    """

    sparsity: Sparsity = 0.5

    def __post_init__(self):
        object.__setattr__(self, "sparsity", _checked_sparsity(self.sparsity))


@dataclass(frozen=True, slots=True)
class FastLinearAttention:
    """Exact: linear-attention layers (lightning attention, gated delta rule, Kimi delta attention, Mamba-2) run hasten's kernels instead of
    transformers' torch fallbacks, in prefill, in the continuation of a cached prefix and in decode, with their state in float32.
    """


Technique = DenseDecode | Wina | Teal | Cats | FastLinearAttention
TECHNIQUES: dict[str, type] = {
    technique.__name__: technique for technique in (DenseDecode, Wina, Teal, Cats, FastLinearAttention)
}


def is_sparse(technique: Technique) -> bool:
    """Whether it skips inputs, for which it needs calibration."""
    return isinstance(technique, InputSparsity | Cats)


def _checked_sparsity(sparsity: Sparsity) -> Sparsity:
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


def _check_allocation(sparsity: Sparsity, allocation: str) -> None:
    if allocation not in ("uniform", "greedy"):
        raise ValueError(f'allocation must be "uniform" or "greedy", got {allocation!r}')
    if allocation == "greedy" and isinstance(sparsity, Mapping):
        raise ValueError("greedy allocation chooses the sparsity of each module itself: give sparsity as one number")
    if allocation == "greedy" and isinstance(sparsity, int | float) and sparsity > HIGHEST:
        raise ValueError(f"greedy allocation reaches sparsities up to {HIGHEST}, got {sparsity!r}")


def _check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
