"""What a guided run leaves: its evaluations, its trace and its time, as a table and as a figure."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from hasten.errors import HastenError
from hasten.guidance.diffusion.guide import TRACE, Step

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Evaluations:
    """What the denoiser computed. per_step: (rows, calls) of every step; a row is one sample in one pass, full guidance makes two of each.

    `full` is how many rows there would be with all of the pipeline's passes at every step.
    """

    per_step: tuple[tuple[int, int], ...]
    full: int

    @property
    def rows(self) -> int:
        return sum(rows for rows, _ in self.per_step)

    @property
    def calls(self) -> int:
        return sum(calls for _, calls in self.per_step)


@dataclass
class PipelineCall:
    """The record of one call of the pipeline: one entry of `steps` for each step that the scheduler made."""

    scheduler: str
    steps: list[dict[str, Any]] = field(default_factory=list)
    full: int = 0
    seconds: float = 0.0

    def add(self, step: Step, rows: int, calls: int, full: int) -> None:
        """A step that is over, with what the guides recorded. full: the rows of all of the pipeline's passes."""
        recorded = step.memory.get(TRACE, {}).get(step.index, {})
        self.steps.append({**recorded, "step": step.index, "sigma": step.sigma, "rows": rows, "calls": calls})
        self.full += full


@dataclass
class Run:
    """What happened inside one `with hasten.guided(...)`. `pipeline_calls` has an entry for each call of the pipeline, also for one that failed."""

    guide: str
    pipeline: str
    pipeline_calls: list[PipelineCall] = field(default_factory=list)

    @property
    def evaluations(self) -> Evaluations:
        """Of all calls of the pipeline."""
        steps = tuple((step["rows"], step["calls"]) for call in self.pipeline_calls for step in call.steps)
        return Evaluations(steps, sum(call.full for call in self.pipeline_calls))

    @property
    def trace(self) -> list[dict[str, Any]]:
        """For every step: `call` (of the pipeline) and `step`, both from 0, `sigma`, `rows`, `calls`, and what the guide recorded (numbers and lists).

        Where both passes were computed also `cosine`, `update_norm` and `conditional_norm` for each row, see `hasten.guidance.diffusion.adaptive.agreement`,
        measured in `space`: in the guide's own, or else on what the model predicts.

        Reading it waits for the device.
        """
        return [
            {"call": index, **{name: _plain(value) for name, value in step.items()}}
            for index, call in enumerate(self.pipeline_calls)
            for step in call.steps
        ]

    @property
    def seconds(self) -> float:
        """Wall time of the denoising loops, from their first denoiser call to their last scheduler step, without text encoders and decoder.

        The last step waits for the device before it ends.
        """
        return sum(call.seconds for call in self.pipeline_calls)

    def __str__(self) -> str:
        lines = [
            f"{self.guide} on {self.pipeline}",
            f"{'call':>4}  {'steps':>5}  {'rows':>6}  {'of':>6}  {'calls':>6}  {'seconds':>8}  scheduler",
        ]
        for index, call in enumerate(self.pipeline_calls):
            counted = Evaluations(tuple((step["rows"], step["calls"]) for step in call.steps), call.full)
            lines.append(
                f"{index:>4}  {len(call.steps):>5}  {counted.rows:>6}  {counted.full:>6}  {counted.calls:>6}  {call.seconds:>8.2f}  "
                f"{call.scheduler}"
            )
        return "\n".join(lines)

    def plot(self) -> Figure:
        """A matplotlib figure: rows for each step, and below them everything that the guide recorded, with one line for each call of the pipeline.

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
