"""What a guided run leaves: its evaluations, its trace and its time, as a table and as a figure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from hasten.errors import HastenError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Evaluations:
    """What the denoiser computed.

    per_step: (rows, calls) of every step; a row is one sample in one pass, full guidance makes two of each. full: how
    many rows there would be with all of the pipeline's passes at every step.
    """

    per_step: tuple[tuple[int, int], ...]
    full: int

    @property
    def rows(self) -> int:
        return sum(rows for rows, _ in self.per_step)

    @property
    def calls(self) -> int:
        return sum(calls for _, calls in self.per_step)

    @classmethod
    def of(cls, steps: Iterable[StepRecord]) -> Evaluations:
        """What these steps computed."""
        steps = tuple(steps)
        return cls(tuple((step.rows, step.calls) for step in steps), sum(step.full for step in steps))


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A step that is over.

    index: in its call, from 0. sigma: its noise level. rows, calls: what the denoiser computed. full: the rows of all
    of the pipeline's passes. recorded: by name, what the guide recorded.
    """

    index: int
    sigma: float
    rows: int
    calls: int
    full: int
    recorded: Mapping[str, Any]


@dataclass(slots=True)
class PipelineCall:
    """The record of one call of the pipeline: one entry of `steps` for each step that the scheduler made."""

    scheduler: str
    steps: list[StepRecord] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def evaluations(self) -> Evaluations:
        """Of this call."""
        return Evaluations.of(self.steps)


@dataclass
class Run:
    """What happened inside one `with hasten.guided(...)`, or under one guider.

    `pipeline_calls` has an entry for each call of the pipeline, also for one that failed.
    """

    guide: str
    pipeline: str
    pipeline_calls: list[PipelineCall] = field(default_factory=list)

    @property
    def evaluations(self) -> Evaluations:
        """Over all calls of the pipeline."""
        return Evaluations.of(step for call in self.pipeline_calls for step in call.steps)

    @property
    def trace(self) -> list[dict[str, Any]]:
        """For every step: `call` (of the pipeline) and `step`, both from 0, `sigma`, `rows`, `calls`, and what the
        guide recorded (numbers and lists).

        Where both passes were computed also `cosine`, `update_norm` and `conditional_norm` for each row, see
        `hasten.guidance.diffusion.adaptive.agreement`, measured in `space`: in the guide's own, or else on what the
        model predicts.

        Reading it waits for the device.
        """
        return [
            {
                "call": index,
                **{name: _plain(value) for name, value in step.recorded.items()},
                "step": step.index,
                "sigma": step.sigma,
                "rows": step.rows,
                "calls": step.calls,
            }
            for index, call in enumerate(self.pipeline_calls)
            for step in call.steps
        ]

    @property
    def seconds(self) -> float:
        """Wall time of the denoising loops, from their first denoiser call to their last scheduler step, without text
        encoders and decoder.

        The last step waits for the device before it ends.
        """
        return sum(call.seconds for call in self.pipeline_calls)

    def __str__(self) -> str:
        lines = [
            f"{self.guide} on {self.pipeline}",
            f"{'call':>4}  {'steps':>5}  {'rows':>6}  {'of':>6}  {'calls':>6}  {'seconds':>8}  scheduler",
        ]
        for index, call in enumerate(self.pipeline_calls):
            counted = call.evaluations
            lines.append(
                f"{index:>4}  {len(call.steps):>5}  {counted.rows:>6}  {counted.full:>6}  {counted.calls:>6}  "
                f"{call.seconds:>8.2f}  {call.scheduler}"
            )
        return "\n".join(lines)

    def plot(self) -> Figure:
        """A matplotlib figure: rows for each step, and below them everything that the guide recorded, with one line for
        each call of the pipeline.

        Raises:
            HastenError: matplotlib, the extra `[plot]`, is not installed.
        """
        if find_spec("matplotlib") is None:
            raise HastenError("matplotlib is not installed; pip install 'hasten[plot]'")
        from matplotlib.figure import Figure

        trace = self.trace
        names = ["rows", *sorted({name for step in trace for name in step if _is_numeric(step[name])} - _COUNTS)]
        figure = Figure(figsize=(7, 1 + 1.6 * len(names)), layout="constrained")
        panels = figure.subplots(len(names), sharex=True, squeeze=False)[:, 0]
        for panel, name in zip(panels, names, strict=True):
            panel.set_ylabel(name)
            for index in range(len(self.pipeline_calls)):
                steps = [step for step in trace if step["call"] == index and name in step]
                panel.plot(
                    [step["step"] for step in steps], [step[name] for step in steps], marker=".", label=f"call {index}"
                )
        panels[-1].set_xlabel("step")
        panels[0].set_title(f"{self.guide} on {self.pipeline}", fontsize="medium")
        return figure


_COUNTS = {"call", "step", "rows", "calls"}


def _plain(value: Any) -> Any:
    """Tensors as numbers and lists; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_numeric(value: Any) -> bool:
    """A number, or one number for each row."""
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(item, (int, float)) for item in values)
