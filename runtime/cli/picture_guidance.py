"""The picture of `hasten demo guidance`: rows are methods, columns are seeds. Needs matplotlib, the extra `[plot]`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

DEFAULT = Path("hasten_guidance.png")
COLUMNS = 10


@dataclass(frozen=True, slots=True)
class Result:
    """One method at one scale.

    evaluations: rows that the model computed, per digit. distance: to CFG at that scale from the same noise, if it ran,
        root mean square over pixels.
    """

    method: str
    scale: float
    guide: str
    evaluations: float
    seconds: float
    accuracy: float
    saturation: float
    contrast: float
    distance: float | None
    samples: torch.Tensor = field(repr=False)


def draw(path: Path, results: Sequence[Result]) -> None:
    """Draws the first digits of each result, as dark ink on paper, under a caption with what the method cost and how
    good all its digits are.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 0.95 * len(results) + 0.4))
    scale = max(result.scale for result in results)
    columns = min(COLUMNS, *(len(result.samples) for result in results))
    figure.suptitle(f"Digits by guidance at scale {scale:g}; columns: seeds 0 to {columns - 1}", fontsize=10)
    grid = figure.subplots(len(results), columns, squeeze=False)
    figure.subplots_adjust(
        left=0.01, right=0.99, bottom=0.01, top=1 - 0.55 / figure.get_figheight(), hspace=0.35, wspace=0
    )
    for row, result in zip(grid, results, strict=True):
        caption = (
            f"{result.method}: {result.evaluations:.0f} evaluations per digit, {result.seconds:.1f} s, "
            f"accuracy {result.accuracy:.0%}, saturation {result.saturation:.1%}"
        )
        row[0].set_title(caption, fontsize=8, loc="left", pad=3)
        for axes, sample in zip(row, result.samples, strict=False):
            axes.imshow(sample[0].clamp(-1, 1).numpy(), cmap="gray_r", vmin=-1, vmax=1)
            axes.set_axis_off()
    figure.savefig(path, dpi=150)
