"""The commands, their options, and how errors are shown. What a command does is in the module of its name."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from typer.core import TyperGroup

import hasten
from hasten.cli.techniques import takes_plan
from hasten.errors import HastenError

Calibration = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Text to calibrate on, a few thousand tokens of typical use.")
]
DType = Annotated[Literal["auto", "float32", "float16", "bfloat16"], typer.Option(help="auto: as it was saved.")]


class _Commands(TyperGroup):
    """Shows an error that the user can mend as one line, with exit status 1. Anything else keeps its traceback."""

    def invoke(self, context):
        try:
            return super().invoke(context)
        except BrokenPipeError:
            raise
        except (HastenError, ValueError, OSError) as error:
            typer.echo(f"hasten: {' '.join(_message(error).split())}", err=True)
            raise typer.Exit(1) from None


def _message(error: Exception) -> str:
    """What went wrong; of the system's own errors without their number."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """The console script `hasten`."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hasten {hasten.__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Makes generative models run faster, and measures what that costs."""


@app.command(short_help="Shows what hasten does on embedded models.")
def demo(
    topic: Annotated[
        Literal["sparsity", "guidance", "constrained", "vision"],
        typer.Argument(
            metavar="TOPIC",
            help="sparsity of language models, guidance of diffusion models, constrained text, or vision tokens.",
        ),
    ] = "sparsity",
    plot: Annotated[
        str, typer.Option(metavar="FILE", help="The picture; auto: hasten_demo.png, or hasten_TOPIC.png.")
    ] = "auto",
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write all that was measured.")] = None,
    quick: Annotated[bool, typer.Option(help="A rough try-out: fewer runs, no large model.")] = False,
) -> None:
    """Shows what hasten does on embedded models, in about two minutes on two free cores.

    \b
    sparsity: drift on the embedded model, decode speed of a 1.1 B model, and a sample.
    guidance: digits drawn by every guide, with what they cost.
    constrained: a record under a JSON schema and a text under a Python predicate, with their weights.
    vision: questions about pictures of digits, answered from fewer and fewer image tokens.
    """
    from hasten.cli import demo, demo_constrained, demo_guidance, demo_vision

    if topic == "constrained":
        if plot != "auto" or quick:
            raise ValueError("--plot and --quick are for the demos of sparsity, guidance and vision")
        demo_constrained.run(json)
    else:
        {"sparsity": demo, "guidance": demo_guidance, "vision": demo_vision}[topic].run(plot, json, quick)


@app.command(short_help="Makes a model faster, measures what that brings and costs, and saves it.")
@takes_plan
def accelerate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A Hugging Face id or folder, or stdlib-llama (embedded).")
    ],
    plan: list,
    calibration: Calibration = None,
    heldout: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text to measure drift on.  [default: a tenth of the calibration text]"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Save the model, its plan and its tokenizer there.")
    ] = None,
    strict: Annotated[bool, typer.Option(help="Refuse a model of which a part cannot be changed.")] = True,
    speed: Annotated[bool, typer.Option(help="Time the model before and after.")] = True,
    drift: Annotated[bool, typer.Option(help="Compare predictions before and after.")] = True,
    dtype: DType = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Makes MODEL faster by the techniques that are given, measures what that brings and costs, and saves it.

    Several techniques make one plan. The report goes to stdout, notes to stderr.
    """
    from hasten.cli import accelerate

    accelerate.run(model, plan, calibration, heldout, out, strict, speed, drift, dtype, json)


@app.command(short_help="Continues a prompt, with techniques and constraints.")
@takes_plan
def generate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A Hugging Face id or folder, a folder of hasten.save, or stdlib-llama (embedded)."
        ),
    ],
    prompt: Annotated[
        str,
        typer.Argument(metavar="PROMPT", help="Given to the model as it is, or with --chat as a user's message."),
    ],
    plan: list,
    calibration: Calibration = None,
    chat: Annotated[bool, typer.Option("--chat", help="PROMPT goes through the model's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[
        float | None, typer.Option(help="0 picks the likeliest token, more samples.  [default: 0; 1 with --particles]")
    ] = None,
    json_schema: Annotated[Path | None, typer.Option(metavar="FILE", help="The text is JSON of this schema.")] = None,
    regex: Annotated[str | None, typer.Option(metavar="PATTERN", help="The text matches this pattern.")] = None,
    choice: Annotated[str | None, typer.Option(metavar="A,B,...", help="The text is one of these.")] = None,
    grammar: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The text is of this Lark or EBNF grammar.")
    ] = None,
    particles: Annotated[int, typer.Option(min=1, help="So many texts compete, and one is drawn by weight.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Of the random numbers.")] = None,
    dtype: DType = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming.")] = False,
) -> None:
    """Continues PROMPT on stdout, with the speed on stderr. Without a technique the model runs as it is.

    With a constraint the text satisfies it, or the exit status is 1.
    """
    from hasten.cli import constrained, generate

    constraint = constrained.constraint_of(json_schema, regex, choice, grammar)
    if temperature is None:
        temperature = 1.0 if particles > 1 else 0.0
    generate.check_temperature(temperature)
    loaded, tokenizer = generate.prepare(model, plan, calibration, dtype)
    message = generate.chat(tokenizer, model, prompt) if chat else prompt
    if constraint is None and particles == 1:
        generate.run(loaded, tokenizer, model, message, max_new_tokens, temperature, json, seed)
    else:
        constrained.run(
            loaded, tokenizer, model, message, constraint, particles, seed, max_new_tokens, temperature, json
        )


@app.command(short_help="Times kernels and decode; tries every technique on every type of model.")
def bench(
    cases: Annotated[
        list[str] | None, typer.Argument(metavar="CASE", help="Parts or patterns of names; see --list.")
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the records as JSON.")] = None,
    list_cases: Annotated[bool, typer.Option("--list", help="Show the names of all cases.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch and of the kernels.")] = None,
) -> None:
    """Times kernels and decode against torch and against hasten's own dense version.

    "sweep", alone or with names of types, instead tries every technique on a tiny model of every type of transformers.
    """
    from hasten.cli import bench

    bench.run(cases or [], json, list_cases, threads)


@app.command(short_help="Shows what is installed, and why a backend does not work.")
def doctor(json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False) -> None:
    """Shows what is installed, which backends work, and why one does not. Exit status 1 if something is broken."""
    from hasten.cli import doctor

    raise typer.Exit(doctor.run(json))
