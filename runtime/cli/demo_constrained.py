"""`hasten demo constrained`: a record extracted as JSON, and a text that a Python function watches over."""

import itertools
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import typer

from hasten.cli import loading, tables
from hasten.generation.generation import generate as constrained
from hasten.guidance.text.constraints import Constraint, JsonSchema, Predicate

SCHEMA = {
    "type": "object",
    "properties": {
        "function": {"enum": ["read", "write", "close", "open"]},
        "arguments": {
            "type": "array",
            "items": {"enum": ["path", "mode", "self", "size", "data"]},
            "minItems": 1,
            "maxItems": 3,
            "uniqueItems": True,
        },
        "lines": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["function", "arguments", "lines"],
    "additionalProperties": False,
}
EXTRACT = """functions = [
    {"function": "read", "arguments": ["self", "size"], "lines": 4},
    {"function": "close", "arguments": ["self"], "lines": 2},
    """
WATCHED = '''class Reader:
    """Read lines from a file.

    '''
PARTICLES, TOKENS = 8, 64


@dataclass(frozen=True, slots=True)
class Example:
    """One constraint, what one token mask after the other gives, and what particles give."""

    title: str
    prompt: str
    constraint: str
    masked: str
    text: str
    log_z: float
    mass_kept: float
    ess: float
    resamplings: int
    checks_per_token: float
    log_weights: list[float | None]


def balanced(text: str) -> bool:
    """No letter q, no line above 60 characters, and nowhere more closing than opening brackets."""
    depths = itertools.accumulate((character == "(") - (character == ")") for character in text)
    return "q" not in text and max(map(len, text.split("\n"))) <= 60 and min(depths, default=0) >= 0


def run(json_file: Path | None) -> None:
    """Generates and prints both examples.

    Raises:
        ValueError, OSError: the JSON cannot be written; found out first.
    """
    start = time.perf_counter()
    if json_file:
        tables.check_writable(json_file)
    model, tokenizer = loading.load(loading.EMBEDDED, [], "float32")
    schema = json.dumps(SCHEMA["properties"])
    examples = [
        example(model, tokenizer, "JSON by a schema", EXTRACT, JsonSchema(SCHEMA, whitespace="[ ]?"), schema),
        example(
            model, tokenizer, "A text under a Python predicate", WATCHED, Predicate(balanced), balanced.__doc__, "\n\n"
        ),
    ]
    for shown in examples:
        _show(shown)
    seconds = time.perf_counter() - start
    if json_file:
        tables.write_json(json_file, {"examples": [asdict(each) for each in examples], "seconds": seconds})
    typer.echo(f"\nDone in {seconds:.0f} s.")


def example(
    model, tokenizer, title: str, prompt: str, constraint: Constraint, about: str, stop: str | None = None
) -> Example:
    """The same prompt and constraint with one particle and with PARTICLES."""
    settings = {"constraint": constraint, "max_new_tokens": TOKENS, "stop": stop, "seed": 0}
    masked = constrained(model, tokenizer, prompt, **settings)
    result = constrained(model, tokenizer, prompt, particles=PARTICLES, **settings)
    return Example(
        title=title,
        prompt=prompt,
        constraint=about,
        masked=masked.text,
        text=result.text,
        log_z=result.log_z,
        mass_kept=result.mass_kept,
        ess=result.ess,
        resamplings=result.resamplings,
        checks_per_token=result.checks_per_token,
        log_weights=[each.log_weight if each.log_weight > -math.inf else None for each in result.particles],
    )


def _show(shown: Example) -> None:
    typer.echo(f"\n{shown.title}\n{'-' * len(shown.title)}")
    typer.echo(f"Prompt:\n{shown.prompt.rstrip()}\nConstraint: {shown.constraint}\n")
    typer.echo(f"One particle (the law of token masks):\n{shown.masked}\n")
    typer.echo(f"{PARTICLES} particles, one drawn by weight:\n{shown.text}\n")
    typer.echo(
        f"mass kept {shown.mass_kept:.3g} (log {shown.log_z:.1f}), {shown.checks_per_token:.1f} checks per token, "
        f"{shown.ess:.1f} of {PARTICLES} particles effective, resampled {shown.resamplings} times"
    )
    weights = ", ".join("dead" if weight is None else f"{weight:.1f}" for weight in shown.log_weights)
    typer.echo(f"log weights: {weights}")
