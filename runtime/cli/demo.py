"""`hasten demo`: what sparsity costs on the embedded model, what it brings on a large one, and a sample of text."""

import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import typer
from torch import nn

import hasten
from hasten.acceleration.anatomy import Anatomy
from hasten.acceleration.inference import Inference
from hasten.acceleration.preflight import examine
from hasten.acceleration.report import TechniqueReport
from hasten.acceleration.techniques import Cats, DenseDecode, Teal, Technique, Wina
from hasten.cli import generate, loading, picture, tables
from hasten.cli.picture import Point
from hasten.model_facts import progress

KINDS = (Wina, Teal, Cats)
SPARSITIES = (0.25, 0.4, 0.5, 0.65)
CALIBRATION_CHARACTERS = 40_000
# Each excerpt of held-out text gives EXCERPT - measure.DRIFT_PREFIX tokens to the drift, and all of them DRIFT_TOKENS.
EXCERPTS, EXCERPT = 8, 48
SPEED_SPARSITY = 0.5
SAMPLE_SPARSITY = 0.5
PROMPT = '''class Reader:
    """Read lines from a file."""

    def __init__(self, path):
'''


@dataclass(frozen=True, slots=True)
class Sample:
    """A greedy continuation of `prompt` by the dense and by the accelerated model."""

    prompt: str
    technique: str
    dense: str
    fast: str


def run(plot: str, json_file: Path | None, quick: bool) -> None:
    """Measures and prints everything.

    Raises:
        ValueError, OSError: the picture or the JSON cannot be written; found out before anything is measured.
    """
    start = time.perf_counter()
    picture_file = picture.destination(plot)
    if json_file:
        tables.check_writable(json_file)
    model, tokenizer = loading.load(loading.EMBEDDED, [], "auto")
    text = (hasten.embedded_model() / "heldout.txt").read_text(encoding="utf-8")
    calibration, heldout = text[:CALIBRATION_CHARACTERS], text[CALIBRATION_CHARACTERS:]

    statistics = hasten.calibrate(model, [kind() for kind in KINDS], calibration, tokenizer)
    pieces = excerpts(heldout, tokenizer, 1 if quick else EXCERPTS)
    points = sweep(model, statistics, pieces, SPARSITIES[::3] if quick else SPARSITIES)
    _show_drift(points)
    records = []
    if not quick:
        from hasten.bench.runtime.decode import compare

        typer.echo("\nBuilding a Llama of 1.1 B random weights in bf16 and timing its decode ...")
        records = compare(sparsities=(SPEED_SPARSITY,), steps=16)
        _show_speed(records)
    sample = continue_both(model, tokenizer, statistics, 12 if quick else 48)
    _show_sample(sample)
    if picture_file:
        picture.draw(picture_file, points, records)
    picture.announce(picture_file, plot)
    seconds = time.perf_counter() - start
    if json_file:
        drift = [asdict(point) for point in points]
        tables.write_json(json_file, {"drift": drift, "speed": records, "sample": asdict(sample), "seconds": seconds})
    typer.echo(f"\nDone in {seconds:.0f} s.")


def sweep(
    model: nn.Module, statistics: hasten.Statistics, pieces: list[torch.Tensor], sparsities: Sequence[float]
) -> list[Point]:
    """Drift of every technique at every sparsity, and of the dense kernels alone, in decode on the same token ids."""
    anatomy = examine(Inference(model), pieces[0])
    plans = [DenseDecode(always=True)] + [kind(sparsity) for sparsity in sparsities for kind in KINDS]
    points = []
    for technique in progress(plans, "drift on the embedded model", unit="run"):
        report = hasten.accelerate(model, technique, calibration=statistics, heldout=pieces, measure_speed=False)
        hasten.revert(model)
        entry = report.techniques[0]
        active = 1.0 if entry.active_share is None else entry.active_share
        read = weights_read(anatomy, entry)
        points.append(Point(_name(technique), getattr(technique, "sparsity", 0.0), active, read, entry.drift))
    return points


def excerpts(text: str, tokenizer, count: int) -> list[torch.Tensor]:
    """`count` stretches of EXCERPT tokens, evenly spread over `text`, each from the start of a line."""
    found = []
    for i in range(count):
        start = text.index("\n", i * len(text) // count) + 1
        ids = tokenizer(text[start : start + 20 * EXCERPT], verbose=False)["input_ids"][:EXCERPT]
        found.append(torch.tensor(ids))
    return found


def weights_read(anatomy: Anatomy, entry: TechniqueReport) -> float:
    """The share of the layers' projection weights that a decode step reads: all of those that the technique leaves
    dense, and of the others as much as it had active inputs.
    """
    if entry.active_share is None:
        return 1.0
    sizes = {projection.name: projection.weight.numel() for projection in anatomy.projections}
    skipping = sum(sizes.get(name, 0) for name in entry.technique.targets(anatomy))
    return 1 - (1 - entry.active_share) * skipping / sum(sizes.values())


def continue_both(model: nn.Module, tokenizer, statistics: hasten.Statistics, tokens: int) -> Sample:
    """PROMPT continued by the dense and by the sparse model, up to `tokens` tokens."""
    technique = Wina(SAMPLE_SPARSITY)
    dense = generate.continue_prompt(model, tokenizer, PROMPT, tokens)
    with hasten.accelerated(model, technique, calibration=statistics, measure_speed=False):
        fast = generate.continue_prompt(model, tokenizer, PROMPT, tokens)
    return Sample(PROMPT, f"{_name(technique)} {SAMPLE_SPARSITY:.0%}", dense.text, fast.text)


def _name(technique: Technique) -> str:
    return "dense" if technique.exact else type(technique).__name__.upper()


def _show_drift(points: list[Point]) -> None:
    rows = []
    for point in points:
        drift = point.drift
        perplexity = f"{drift.dense_perplexity:.3g} -> {drift.fast_perplexity:.3g}"
        name, read = (f"{point.sparsity:.0%}", point.technique), f"{point.weights_read:.0%}"
        rows.append((*name, f"{drift.kl:.2g}", f"{drift.top1:.1%}", perplexity, read))
    columns = ("sparsity", "technique", "KL per token (nats)", "same top-1 token", "perplexity", "weights read")
    tokens = points[0].drift.tokens
    title = f"Drift from the dense model, measured on the embedded model ({tokens} held-out tokens, decoded one by one)"
    tables.show(title, columns, rows, labels=2)
    typer.echo(
        "Real kernels and real decode; calibrated on the first part of the held-out text, measured on the rest.\n"
        "Weights read: of all weights in the layers, per token, by the inputs counted as active on this text.\n"
        "CATS skips in up and down only and leaves attention and gate dense, so at equal sparsity it does more work:\n"
        "compare at equal weights read."
    )


def _show_speed(records: list[dict]) -> None:
    rows = []
    for record in records:
        seconds = record["seconds"]
        speed = f"{seconds * 1e3:.1f}", f"{1 / seconds:.1f}", tables.ratio(record["ratio"])
        rows.append((record["case"], record["baseline"], *speed))
    columns = ("model", "against", "ms per token", "tokens/s", "ratio")
    tables.show("Decode speed, batch 1, random weights", columns, rows, labels=2)


def _show_sample(sample: Sample) -> None:
    for label, text in (("dense", sample.dense), (sample.technique, sample.fast)):
        typer.echo(f"\nThe embedded model, greedy, {label}:\n" + textwrap.indent(sample.prompt + text, "    "))
