"""The settings of constrained sampling: how tokens are drawn, how particles are kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from hasten.guidance.smc import SCHEMES, Scheme
from hasten.guidance.text.warp import check_warp

Method = Literal["awrs", "mask", "reject"]

METHODS = ("awrs", "mask", "reject")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The arguments of `hasten.generate` of the same names, which says what each of them does.

    Raises:
        ValueError: a value of a wrong type or out of its range; the message names both.
    """

    particles: int = 1
    method: Method = "awrs"
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float = 1.0
    max_checks: int | None = None
    extra_checks: int = 0
    ess_threshold: float = 0.5
    resampling: Scheme = "systematic"
    critic: Callable[[str], float] | None = None

    def __post_init__(self):
        check_integer("particles", self.particles, low=1)
        check_integer("max_new_tokens", self.max_new_tokens, low=1)
        check_integer("top_k", self.top_k, low=1, optional=True)
        check_integer("max_checks", self.max_checks, low=1, optional=True)
        check_integer("extra_checks", self.extra_checks, low=0)
        for name in ("temperature", "top_p", "repetition_penalty", "ess_threshold"):
            _check_type(name, getattr(self, name), Real, "a number", optional=name == "top_p")
        check_warp(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
        )
        if not 0 <= self.ess_threshold <= 1:
            raise ValueError(f"ess_threshold must be between 0 and 1, got {self.ess_threshold}")
        check_choice("method", self.method, METHODS)
        check_choice("resampling", self.resampling, SCHEMES)
        if self.critic is not None and not callable(self.critic):
            raise ValueError(f"critic must be a function from a text to a log score, got {self.critic!r:.60}")
        if self.greedy and self.particles > 1:
            raise ValueError(f"temperature 0 takes one text, particles={self.particles} would all be the same")
        if self.method != "awrs" and (self.max_checks is not None or self.extra_checks):
            raise ValueError(f"max_checks and extra_checks are settings of method 'awrs', not of {self.method!r}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest valid token is taken instead of a draw."""
        return self.temperature == 0


def check_integer(name: str, value: Any, low: int | None = None, optional: bool = False) -> None:
    """Refuses a setting that is no integer, or below `low`; optional: None passes.

    Raises:
        ValueError: names the setting and its value.
    """
    _check_type(name, value, Integral, "an integer", optional)
    if low is not None and value is not None and value < low:
        raise ValueError(f"{name} must be {low} or more{', or None' if optional else ''}, got {value}")


def check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    """Refuses a setting that is none of the known names.

    Raises:
        ValueError: names the setting, its value and the known names.
    """
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def _check_type(name: str, value: Any, kind: type, what: str, optional: bool) -> None:
    if not (isinstance(value, kind) or (value is None and optional)):
        raise ValueError(f"{name} must be {what}{', or None' if optional else ''}, got {value!r:.60}")
