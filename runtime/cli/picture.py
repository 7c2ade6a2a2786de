"""The picture of `hasten demo`: drift against the weights that are read. Needs matplotlib, the extra `[plot]`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import typer

from hasten.acceleration.measure import Drift
from hasten.cli import tables

DEFAULT = Path("hasten_demo.png")
COLOURS = {"WINA": "#0072b2", "TEAL": "#d55e00", "CATS": "#009e73"}
MARKERS = {"WINA": "o", "TEAL": "s", "CATS": "^"}
# Labels of WINA and TEAL, which read the same share, stay apart: right below a point, or left above it.
BELOW = {"xytext": (7, -4), "textcoords": "offset points", "ha": "left", "va": "top"}
ABOVE = {"xytext": (-7, 5), "textcoords": "offset points", "ha": "right", "va": "bottom"}
LABELS = {"WINA": BELOW, "TEAL": ABOVE, "CATS": ABOVE}


@dataclass(frozen=True, slots=True)
class Point:
    """One technique at one sparsity.

    active_share: of the inputs that the technique chooses from, the share that was multiplied; counted on the held-out
        text. 1 where nothing is skipped.
    weights_read: the share of the layers' weights that a decode step reads, from `active_share`.
    """

    technique: str
    sparsity: float
    active_share: float
    weights_read: float
    drift: Drift


def destination(plot: str, default: Path = DEFAULT) -> Path | None:
    """Where the picture goes; None where nobody named a file, and there is no matplotlib or the folder
    cannot be written to.

    Raises:
        ValueError: a file was named and matplotlib is not installed.
        OSError: the file cannot be written.
    """
    installed = find_spec("matplotlib") is not None
    if plot == "auto" and not installed:
        return None
    if not installed:
        raise ValueError("--plot needs matplotlib: pip install 'hasten[plot]'")
    if plot == "auto":
        return default if os.access(default.resolve().parent, os.W_OK) else None
    path = Path(plot)
    tables.check_writable(path)
    return path


def announce(path: Path | None, plot: str) -> None:
    """Says where the picture is, or what it takes where `destination` found no place for one that nobody named."""
    if path:
        typer.echo(f"\nPicture: {path.resolve()}")
    elif plot == "auto":
        typer.echo(
            "\nNo picture: it takes matplotlib (pip install 'hasten[plot]') and a folder that can be written to."
        )


def draw(path: Path, points: Sequence[Point], records: Sequence[dict]) -> None:
    """Draws KL over weights read, one line per technique, with the large model's measured speed at its sparsity."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.add_subplot()
    against = [record for record in records if record["baseline"] == "transformers"]
    speeds = {record["case"].split(" ", 1)[-1]: record["ratio"] for record in against}  # case: "1.1B wina 50%"
    for technique, colour in COLOURS.items():
        line = [point for point in points if point.technique == technique]
        read, kl = [point.weights_read for point in line], [point.drift.kl for point in line]
        axes.plot(read, kl, color=colour, marker=MARKERS[technique], label=technique)
        for point in line:
            label, speed = f"{point.sparsity:.0%}", speeds.get(f"{technique.lower()} {point.sparsity:.0%}")
            if speed:
                label += f"\n1.1 B model decodes at\n{speed:.2f}x transformers"
            axes.annotate(label, (point.weights_read, point.drift.kl), color=colour, fontsize=8, **LABELS[technique])
    axes.set_yscale("log")
    axes.margins(x=0.12, y=0.1)
    axes.invert_xaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("weights of the layers read per token (of all)")
    axes.set_ylabel("drift: KL(dense || sparse), nats per token")
    axes.set_title(f"Embedded model, {points[0].drift.tokens} held-out tokens; labels: sparsity", fontsize=10)
    axes.grid(True, which="both", linewidth=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
