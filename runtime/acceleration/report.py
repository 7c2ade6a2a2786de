"""What accelerate returns: every edit, what was left alone and why, measured speed and measured drift."""

import dataclasses
import json
from dataclasses import dataclass, field

from hasten.acceleration.measure import Drift, Timing
from hasten.acceleration.plan import Plan
from hasten.acceleration.techniques import Settings, Technique
from hasten.acceleration.techniques.base import DECODE, Skip


@dataclass(slots=True)
class TechniqueReport:
    """What one technique did.

    Attributes:
        technique: it; `implied` by another one, not named in the plan.
        edited: the names of the parts that were changed.
        settings: what it decided for this model.
        skipped: what was left as it was, and why.
        timings: speed in every regime that a technique of the plan names; before is the model with the techniques that
            came earlier.
        drift: of the model with this technique and the earlier ones, from the dense one. None if not measured.
        no_drift: why drift was not measured.
        active_share: the share of inputs that was really multiplied, counted on the held-out text; None where nothing
            is skipped by design, or nothing was counted.
    """

    technique: Technique
    edited: list[str]
    settings: Settings = field(default_factory=Settings)
    skipped: list[Skip] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    drift: Drift | None = None
    no_drift: str = ""
    active_share: float | None = None
    implied: bool = False

    def __str__(self) -> str:
        name = f"{self.technique}, implied" if self.implied else str(self.technique)
        summary = self.technique.summary(self.settings)
        lines = [f"{name}: {len(self.edited)} modules{', ' if summary else ''}{summary}"]
        lines += [f"  {_change(timing)}" for timing in self.timings]
        if self.active_share is not None:
            lines.append(f"  active   {self.active_share:.1%} of the inputs, counted on held-out text")
        if self.drift:
            lines.append(
                f"  drift    KL {self.drift.kl:.4g} nats per token, top-1 agreement {self.drift.top1:.1%}, perplexity "
                f"{self.drift.dense_perplexity:.4g} -> {self.drift.fast_perplexity:.4g} "
                f"({self.drift.tokens} held-out tokens in decode)"
            )
        elif self.technique.exact:
            lines.append("  drift    by rounding only")
        else:
            lines.append(f"  drift    not measured: {self.no_drift}")
        reasons: dict[str, list[str]] = {}
        for skip in self.skipped:
            reasons.setdefault(skip.reason, []).append(skip.name)
        lines += [
            f"  left     {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {reason}"
            for reason, names in reasons.items()
        ]
        return "\n".join(lines)


@dataclass(slots=True)
class Report:
    """The outcome of `hasten.accelerate`; printing it shows everything that was measured.

    `self_check` is the largest relative distance of a part from its definition; None where no edit verifies itself.
    """

    plan: Plan
    techniques: list[TechniqueReport]
    memory_before: int
    memory_after: int
    self_check: float | None
    calibration_tokens: int = 0

    @property
    def drift(self) -> Drift | None:
        """Drift of the whole plan, None if it was not measured."""
        return next((entry.drift for entry in reversed(self.techniques) if entry.drift), None)

    @property
    def speedup(self) -> float | None:
        """Decode speed (batch 1) of the whole plan over the dense model's, after 128 tokens or as many as can be read
        (a prompt with a picture may have more). None if it was not measured."""
        timings = [timing for entry in self.techniques for timing in entry.timings]
        decoded = {timing.regime for timing in timings if timing.regime.batch == timing.regime.tokens == 1}
        nearest = min(decoded, key=lambda regime: abs(regime.context - DECODE.context), default=None)
        ratios = [timing.ratio for timing in timings if timing.regime == nearest]
        product = 1.0
        for ratio in ratios:
            product *= ratio
        return product if ratios else None

    @property
    def skipped(self) -> list[Skip]:
        return [skip for entry in self.techniques for skip in entry.skipped]

    def to_dict(self) -> dict:
        techniques = []
        for entry in self.techniques:
            techniques.append(
                {
                    "technique": type(entry.technique).__name__,
                    "configuration": dataclasses.asdict(entry.technique),
                    "implied": entry.implied,
                    "edited": entry.edited,
                    "settings": dict(entry.settings.values),
                    "skipped": [dataclasses.asdict(skip) for skip in entry.skipped],
                    "timings": [
                        {
                            "regime": str(timing.regime),
                            "before": timing.before,
                            "after": timing.after,
                            "ratio": timing.ratio,
                        }
                        for timing in entry.timings
                    ],
                    "drift": dataclasses.asdict(entry.drift) if entry.drift else None,
                    "no_drift": entry.no_drift,
                    "active_share": entry.active_share,
                }
            )
        return {
            "plan": self.plan.to_dict(),
            "techniques": techniques,
            "memory_before": self.memory_before,
            "memory_after": self.memory_after,
            "self_check": self.self_check,
            "calibration_tokens": self.calibration_tokens,
            "speedup": self.speedup,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        check = "nothing to check: no edit verifies itself"
        if self.self_check is not None:
            check = (
                f"kernels agree with their definition to {self.self_check:.1e} "
                "(largest relative distance of a module in a prefill and a decode step)"
            )
        growth = self.memory_after / self.memory_before - 1
        return "\n".join(
            [str(technique) for technique in self.techniques]
            + [
                f"memory   {self.memory_before / 1e6:.1f} -> {self.memory_after / 1e6:.1f} MB ({growth:+.1%})",
                f"check    {check}",
            ]
        )


def _change(timing: Timing) -> str:
    verdict = "faster" if timing.ratio >= 1.02 else "slower" if timing.ratio <= 0.98 else "the same"
    change = f"{timing.before * 1e3:.2f} -> {timing.after * 1e3:.2f} ms ({timing.ratio:.2f}x, {verdict})"
    return f"{timing.regime}: {change}"
