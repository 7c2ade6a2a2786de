"""`hasten accelerate`: a plan carried out on a model, its report, and the model saved with it."""

from pathlib import Path

import typer

import hasten
from hasten.acceleration.saved_folder import PLAN_FILE
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
    """Accelerates `name` by `plan`, prints the report, and saves the model in `out` if that is given.

    Raises:
        ValueError, OSError, HastenError: something that the user gave cannot be used; the message names it.
    """
    if not plan:
        raise ValueError(f"choose what to do: {techniques.options()}")
    if heldout is not None and not drift:
        raise ValueError("--heldout is what drift is measured on: give it, or --no-drift")
    if out is not None:
        check_out(out)
    calibration_text = loading.calibration_text(plan, calibration)
    heldout_text = None if heldout is None else loading.sample(heldout)
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
    typer.echo(report.to_json() if as_json else str(report))
    if out is not None:
        hasten.save(model, out, tokenizer)
        tables.say(f"saved in {out}: hasten generate and hasten.load take it accelerated, transformers as it was")


def check_out(folder: Path) -> None:
    """Raises OSError unless a model can be saved in `folder`; found out before one is loaded.

    A folder that `hasten.save` wrote is written anew. One that holds another model is left alone.
    """
    tables.check_folder(folder)
    if (folder / "config.json").exists() and not (folder / PLAN_FILE).exists():
        raise FileExistsError(f"{folder} holds a model that hasten.save did not write: choose another folder")
