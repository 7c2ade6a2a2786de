"""`hasten generate`: any model, accelerated or not, continuing a prompt."""

import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
import typer
from torch import nn

import hasten
from hasten.acceleration.install import installed_on
from hasten.acceleration.saved_folder import PLAN_FILE
from hasten.acceleration.techniques import Cats, DenseDecode, Teal, Technique, Wina

EMBEDDED = "stdlib-llama"
CALIBRATION_CHARACTERS = 20_000


@dataclass(frozen=True, slots=True)
class Generation:
    """A continuation. `prefill_seconds` last until the first token, `decode_seconds` from there to the last."""

    text: str
    tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed; None where there is only one token."""
        return (self.tokens - 1) / self.decode_seconds if self.tokens > 1 else None


class _Clock(transformers.TextStreamer):
    """Streams prompt and continuation to stdout if `shown`, and notes when each token came."""

    def __init__(self, tokenizer, shown: bool):
        super().__init__(tokenizer, skip_special_tokens=True)
        self.shown, self.times = shown, []

    def put(self, value):
        self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False):
        if self.shown:
            super().on_finalized_text(text, stream_end)


def techniques(
    wina: float | None, teal: float | None, cats: float | None, dense: bool, greedy: bool
) -> list[Technique]:
    """The techniques that the options ask for.

    Raises:
        ValueError: a sparsity outside [0, 1), greedy allocation of nothing.
    """
    if greedy and wina is None and teal is None:
        raise ValueError("--greedy-allocation shares the sparsity of --wina or --teal: give one of them")
    allocation = "greedy" if greedy else "uniform"
    chosen = [kind(sparsity, allocation) for kind, sparsity in ((Wina, wina), (Teal, teal)) if sparsity is not None]
    chosen += [Cats(cats)] if cats is not None else []
    return chosen + ([DenseDecode()] if dense else [])


def run(
    name: str,
    prompt: str,
    plan: list[Technique],
    calibration: Path | None,
    max_new_tokens: int,
    temperature: float,
    dtype: str,
    as_json: bool,
    seed: int | None = None,
) -> None:
    """Loads `name`, accelerates it by `plan` and prints the continuation of `prompt`; the same for the same seed.

    Raises:
        ValueError, OSError, HastenError: something that the user gave cannot be used; the message names it.
    """
    if math.isnan(temperature) or temperature < 0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    model, tokenizer = prepare(name, plan, calibration, dtype)
    if seed is not None:
        torch.manual_seed(seed)
    generation = continue_prompt(model, tokenizer, prompt, max_new_tokens, temperature, shown=not as_json)
    speed = generation.tokens_per_second
    if as_json:
        installed = installed_on(model)
        record = {
            "model": name,
            "plan": [repr(technique) for technique in (installed.plan if installed else ())],
            "prompt": prompt,
        }
        typer.echo(json.dumps(record | asdict(generation) | {"tokens_per_second": speed}, indent=2))
    decode = f"{speed:.1f} tokens/s in decode" if speed else "one token"
    _say(f"{generation.tokens} tokens, {decode}, first token after {generation.prefill_seconds:.2f} s")


def prepare(
    name: str, plan: list[Technique], calibration: Path | None, dtype: str
) -> tuple[nn.Module, transformers.PreTrainedTokenizerBase]:
    """`load`, and accelerated by `plan`."""
    text = _calibration_text(plan, calibration)
    model, tokenizer = load(name, plan, dtype)
    if plan:
        sparse = [technique for technique in plan if not isinstance(technique, DenseDecode)]
        statistics = hasten.calibrate(model, sparse, text, tokenizer) if sparse else None
        report = hasten.accelerate(model, plan, calibration=statistics, measure_speed=False)
        edited, left = sum(len(entry.edited) for entry in report.techniques), len(report.skipped)
        _say(
            f"changed {edited} modules, left {left} as they were; hasten.accelerate in Python measures speed and drift"
        )
    return model, tokenizer


def load(name: str, plan: list[Technique], dtype: str) -> tuple[nn.Module, transformers.PreTrainedTokenizerBase]:
    """A model in eval mode without gradients, on the GPU if there is one, and its tokenizer.

    A folder that `hasten.save` wrote comes accelerated.

    Raises:
        ValueError: a plan for a folder that holds one.
        OSError: no such model.
    """
    if name.startswith(("/", ".", "~")) and not Path(name).expanduser().is_dir():
        raise FileNotFoundError(f"there is no folder {name}")
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    folder = hasten.embedded_model() if name == EMBEDDED else Path(name).expanduser()
    source = folder if folder.is_dir() else name
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    if (folder / PLAN_FILE).is_file():
        if plan:
            raise ValueError(f"{name} holds a plan of hasten.save: leave out the options that choose techniques")
        return hasten.load(folder, dtype=dtype if dtype == "auto" else getattr(torch, dtype), device=device), tokenizer
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    return model.to(device).eval().requires_grad_(False), tokenizer


def continue_prompt(
    model, tokenizer, prompt: str, max_new_tokens: int, temperature: float = 0.0, shown: bool = False
) -> Generation:
    """Up to `max_new_tokens` tokens after `prompt`, the likeliest at temperature 0; `shown` streams them to stdout.

    Raises:
        ValueError: a prompt without tokens.
    """
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    length = inputs["input_ids"].shape[1]
    if not length:
        raise ValueError("the prompt is empty")
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    clock = _Clock(tokenizer, shown)
    padding = tokenizer.pad_token_id
    output = model.generate(**inputs, **sampling, max_new_tokens=max_new_tokens, streamer=clock, pad_token_id=padding)
    new = output[0, length:]
    prompted, first, last = clock.times[0], clock.times[1], clock.times[-1]
    return Generation(tokenizer.decode(new, skip_special_tokens=True), len(new), first - prompted, last - first)


def _calibration_text(plan: list[Technique], calibration: Path | None) -> str:
    sparse = any(not isinstance(technique, DenseDecode) for technique in plan)
    if calibration is not None:
        if not sparse:
            raise ValueError("--calibration is for --wina, --teal and --cats: give one of them, or leave it out")
        return calibration.read_text(encoding="utf-8")
    if sparse:
        _say("calibrating on Python sources that come with hasten; --calibration FILE takes text of your own use")
        return (hasten.embedded_model() / "heldout.txt").read_text(encoding="utf-8")[:CALIBRATION_CHARACTERS]
    return ""


def _say(message: str) -> None:
    typer.echo(f"hasten: {message}", err=True)
