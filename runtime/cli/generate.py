"""`hasten generate`: any model, accelerated or not, continuing a prompt."""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
import typer
from torch import nn

import hasten
from hasten.acceleration.install import installed_on
from hasten.acceleration.techniques import Technique
from hasten.cli import loading, tables
from hasten.generation.prompts import Prompt, check_lengths, tokenize_prompts


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
    """Streams the continuation, after a prompt that is a text, to stdout if `shown`; notes when each token came."""

    def __init__(self, tokenizer, prompt: Prompt, shown: bool):
        super().__init__(tokenizer, skip_prompt=not isinstance(prompt, str), skip_special_tokens=True)
        self.shown, self.times = shown, []

    def put(self, value):
        self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False):
        if self.shown:
            super().on_finalized_text(text, stream_end)


def run(
    model: nn.Module,
    tokenizer: transformers.PreTrainedTokenizerBase,
    name: str,
    prompt: Prompt,
    max_new_tokens: int,
    temperature: float,
    as_json: bool,
    seed: int | None = None,
) -> None:
    """Prints the continuation of `prompt` by the model called `name`; the same for the same seed.

    Raises:
        ValueError, HastenError: something that the user gave cannot be used; the message names it.
    """
    if seed is not None:
        torch.manual_seed(seed)
    generation = continue_prompt(model, tokenizer, prompt, max_new_tokens, temperature, shown=not as_json)
    speed = generation.tokens_per_second
    if as_json:
        installed = installed_on(model)
        plan = [repr(technique) for technique in (installed.plan if installed else ())]
        record = {"model": name, "plan": plan, "prompt": prompt}
        typer.echo(json.dumps(record | asdict(generation) | {"tokens_per_second": speed}, indent=2))
    decode = f"{speed:.1f} tokens/s in decode" if speed else "one token"
    tables.say(f"{generation.tokens} tokens, {decode}, first token after {generation.prefill_seconds:.2f} s")


def check_temperature(temperature: float) -> None:
    """Raises ValueError for a temperature that is no number from 0 on; found out before a model is loaded."""
    if math.isnan(temperature) or temperature < 0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")


def prepare(
    name: str, plan: list[Technique], calibration: Path | None, dtype: str
) -> tuple[nn.Module, transformers.PreTrainedTokenizerBase]:
    """The model called `name`, accelerated by `plan`, and its tokenizer; nothing is measured.

    Raises:
        ValueError, OSError, HastenError: as `loading.load` and `hasten.accelerate`.
    """
    text = loading.calibration_text(plan, calibration)
    model, tokenizer = loading.load(name, plan, dtype)
    if plan:
        statistics = None if text is None else hasten.calibrate(model, plan, text, tokenizer)
        report = hasten.accelerate(model, plan, calibration=statistics, measure_speed=False)
        edited, left = sum(len(entry.edited) for entry in report.techniques), len(report.skipped)
        tables.say(f"changed {edited} modules, left {left} as they were; hasten accelerate measures speed and drift")
    return model, tokenizer


def chat(tokenizer: transformers.PreTrainedTokenizerBase, name: str, message: str) -> list[dict[str, str]]:
    """`message` as a user's first message to the model called `name`.

    Raises:
        ValueError: there is no chat template, or it refuses the message.
    """
    messages = [{"role": "user", "content": message}]
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"the tokenizer of {name} has no chat template: leave out --chat")
    try:
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template is a program of the model's maker, and may raise anything
        raise ValueError(f"the chat template of {name} refuses the message: {error}") from error
    return messages


def continue_prompt(
    model, tokenizer, prompt: Prompt, max_new_tokens: int, temperature: float = 0.0, shown: bool = False
) -> Generation:
    """Up to `max_new_tokens` tokens after `prompt`, a text or chat messages, the likeliest at temperature 0.

    `shown` streams them to stdout.

    Raises:
        ValueError: a prompt without tokens, or too long for the model.
    """
    (tokens,), _ = tokenize_prompts(prompt, tokenizer)
    check_lengths(model, [tokens], max_new_tokens)
    ids = torch.tensor([tokens], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    clock = _Clock(tokenizer, prompt, shown)
    padding = tokenizer.pad_token_id
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": max_new_tokens, "pad_token_id": padding}
    new = model.generate(ids, **settings, **sampling, streamer=clock)[0, len(tokens) :]
    prompted, first, last = clock.times[0], clock.times[1], clock.times[-1]
    return Generation(tokenizer.decode(new, skip_special_tokens=True), len(new), first - prompted, last - first)
