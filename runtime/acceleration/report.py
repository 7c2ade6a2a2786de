"""What accelerate returns: every edit, what was left alone and why, measured speed and measured drift."""

import dataclasses
import json
from dataclasses import dataclass, field

from hasten.acceleration.bind import Setting
from hasten.acceleration.measure import PREFILL_TOKENS, Drift, Speed
from hasten.acceleration.plan import Plan
from hasten.acceleration.techniques import Technique


@dataclass(frozen=True, slots=True)
class Skip:
    """A module that was left as it was, and why."""

    name: str
    reason: str


@dataclass(slots=True)
class TechniqueReport:
    """What one technique did. `before` is the model with the techniques that came earlier in the plan; drift is against the dense model."""

    technique: Technique
    edited: list[str]
    settings: list[Setting] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    before: Speed | None = None
    after: Speed | None = None
    drift: Drift | None = None

    def __str__(self) -> str:
        lines = [f"{self.technique}: {len(self.edited)} modules"]
        if self.settings:
            sparsities = [setting.sparsity for setting in self.settings]
            lines[0] += f", {len(self.settings)} of them sparse at {_span(sparsities)}"
        if self.before and self.after:
            lines.append(f"  decode   {_change(self.before.decode_seconds, self.after.decode_seconds, 'per token')}")
            lines.append(
                f"  prefill  {_change(self.before.prefill_seconds, self.after.prefill_seconds, f'for {PREFILL_TOKENS} tokens')}"
            )
        if self.drift:
            lines.append(
                f"  drift    KL {self.drift.kl:.4g} nats per token, top-1 agreement {self.drift.top1:.1%}, perplexity "
                f"{self.drift.dense_perplexity:.4g} -> {self.drift.fast_perplexity:.4g} ({self.drift.tokens} held-out tokens in decode)"
            )
        else:
            lines.append("  drift    not measured: pass heldout=, texts or token ids")
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
    """The outcome of `hasten.accelerate`; printing it shows everything that was measured."""

    plan: Plan
    techniques: list[TechniqueReport]
    memory_before: int
    memory_after: int
    self_check: float
    calibration_tokens: int = 0

    @property
    def drift(self) -> Drift | None:
        """Drift of the whole plan."""
        return self.techniques[-1].drift

    @property
    def speedup(self) -> float | None:
        """Decode speed of the whole plan over the dense model's, None if it was not measured."""
        first, last = self.techniques[0].before, self.techniques[-1].after
        return first.decode_seconds / last.decode_seconds if first and last else None

    @property
    def skipped(self) -> list[Skip]:
        return [skip for technique in self.techniques for skip in technique.skipped]

    def to_dict(self) -> dict:
        techniques = []
        for entry in self.techniques:
            fields = dataclasses.asdict(entry)
            configuration = fields.pop("technique")
            techniques.append({"technique": type(entry.technique).__name__, "configuration": configuration} | fields)
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
        growth = self.memory_after / self.memory_before - 1
        return "\n".join(
            [str(technique) for technique in self.techniques]
            + [
                f"memory   {self.memory_before / 1e6:.1f} -> {self.memory_after / 1e6:.1f} MB ({growth:+.1%})",
                f"check    kernels agree with their definition to {self.self_check:.1e} (largest relative distance of a module in one decode step)",
            ]
        )


def _span(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.0%}" if low == high else f"{low:.0%} to {high:.0%}"


def _change(before: float, after: float, unit: str) -> str:
    ratio = before / after
    verdict = "faster" if ratio >= 1.02 else "slower" if ratio <= 0.98 else "the same"
    return f"{before * 1e3:.2f} -> {after * 1e3:.2f} ms {unit} ({ratio:.2f}x, {verdict})"
