"""`hasten generate` under a constraint."""

import json
import sys
from pathlib import Path

import typer

from hasten.cli import loading, tables
from hasten.generation.generation import generate
from hasten.generation.prompts import Prompt
from hasten.generation.results import Generated
from hasten.guidance.text.constraints import Choice, Constraint, Grammar, JsonSchema, Regex


def constraint_of(
    json_schema: Path | None, regex: str | None, choice: str | None, grammar: Path | None
) -> Constraint | None:
    """What the options ask for, all of it at once; None where they ask for nothing.

    Raises:
        OSError, ValueError: a file that cannot be read, or that is no UTF-8; a choice of nothing.
    """
    if choice == "":
        raise ValueError("--choice is empty: give texts with commas between them")
    parts: list[Constraint] = []
    parts += [JsonSchema(loading.read(json_schema))] if json_schema is not None else []
    parts += [Regex(regex)] if regex is not None else []
    parts += [Choice(choice.split(","))] if choice is not None else []
    parts += [Grammar(loading.read(grammar))] if grammar is not None else []
    if not parts:
        return None
    whole = parts[0]
    for part in parts[1:]:
        whole = whole & part
    return whole


def run(
    model,
    tokenizer,
    name: str,
    prompt: Prompt,
    constraint: Constraint | None,
    particles: int,
    seed: int | None,
    max_new_tokens: int,
    temperature: float,
    as_json: bool,
) -> None:
    """Prints a text that satisfies the constraint: streamed where one particle makes it, or one JSON object.

    Raises:
        DeadEndError, ValueError: as `hasten.generate`.
    """
    settings = {"constraint": constraint, "seed": seed, "max_new_tokens": max_new_tokens, "temperature": temperature}
    if particles > 1 or as_json:
        result = generate(model, tokenizer, prompt, particles=particles, **settings)
        typer.echo(json.dumps(_record(name, prompt, result), indent=2) if as_json else result.text)
    else:
        stream = generate(model, tokenizer, prompt, stream=True, **settings)
        for piece in stream:
            sys.stdout.write(piece)
            sys.stdout.flush()
        typer.echo()
        result = stream.result
    kept = "" if result.mass_kept != result.mass_kept else f", mass kept {result.mass_kept:.3g}"
    effective = f", {result.ess:.1f} of {particles} particles effective" if particles > 1 else ""
    tokens = f"{len(result.tokens)} tokens, {result.checks_per_token:.1f} checks per token"
    tables.say(f"{result.status}, {tokens}{kept}{effective}")


def _record(name: str, prompt: Prompt, result: Generated) -> dict:
    finite = result.log_z if abs(result.log_z) < float("inf") else None  # JSON has no NaN
    return {
        "model": name,
        "prompt": prompt,
        "text": result.text,
        "value": result.value,
        "status": result.status,
        "tokens": len(result.tokens),
        "log_z": finite,
        "ess": result.ess,
        "checks_per_token": result.checks_per_token,
    }
