"""`hasten accelerate`: a plan carried out on a model, its report, and the model saved with it."""

from pathlib import Path

import typer

import hasten
from hasten.acceleration.techniques import Technique
from hasten.cli import loading, tables, techniques


def run(
    name: str,
    plan: list[Technique],
    calibration: Path | None,
    heldout: Path | None,
    out: Path | None,
    strict: bool,
    speed: bool,
    drift: bool,
    dtype: str,
    as_json: bool,
) -> None:
    """Accelerates `name` by `plan`, saves it in `out` if that is given, and prints the report.

    Raises:
        ValueError, OSError, HastenError: something that the user gave cannot be used; the message names it.
    """
    if not plan:
        raise ValueError(f"choose what to do: {techniques.options()}")
    if heldout is not None and not drift:
        raise ValueError("--heldout is what drift is measured on: give it, or --no-drift")
    if out is not None:
        tables.check_folder(out)
    calibration_text = loading.calibration_text(plan, calibration)
    heldout_text = None if heldout is None else loading.read(heldout)
    model, tokenizer = loading.load(name, plan, dtype)
    report = hasten.accelerate(
        model,
        plan,
        calibration=calibration_text,
        tokenizer=tokenizer,
        heldout=heldout_text,
        strict=strict,
        measure_speed=speed,
        measure_drift=drift,
    )
    if out is not None:
        hasten.save(model, out, tokenizer)
    typer.echo(report.to_json() if as_json else str(report))
    if out is not None:
        tables.say(f"saved in {out}: hasten generate and hasten.load take it accelerated, transformers as it was")
