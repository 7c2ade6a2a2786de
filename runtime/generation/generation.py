"""`hasten.generate`: text under a constraint, from the model's own law given that constraint."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import nn

from hasten.errors import HastenError
from hasten.generation.decoder import Decoder, check_lengths
from hasten.generation.particles import METHODS, Method, Particle, Run, Sampling, Status
from hasten.generation.text import After, Printer, Stops
from hasten.generation.tokenizer import vocabulary_of
from hasten.guidance.smc import SCHEMES, Scheme
from hasten.guidance.text.categorical import sample, uniforms
from hasten.guidance.text.constraints import Conjunction, Constraint, JsonSchema, Substring
from hasten.guidance.text.warp import check_warp

Message = dict[str, Any]
Prompt = str | Sequence[str] | Sequence[Message] | Sequence[Sequence[Message]]

PLACES = 100


@dataclass(frozen=True, slots=True)
class Text:
    """One particle at the end.

    text: what was generated, without EOS, without a stop string, and without the preamble. tokens: the ids that were drawn, EOS and those of the preamble
    too. log_weight: log of its weight; -inf for a dead one.
    """

    text: str
    tokens: tuple[int, ...]
    log_weight: float
    status: Status


@dataclass(frozen=True, slots=True)
class Generated:
    """What `hasten.generate` gives for a prompt.

    Attributes:
        text, tokens, log_weight: those of one particle, drawn by weight; of the longest where all are dead.
        status: "complete" (the model ended the text), "stopped" (a stop string), "length" (max_new_tokens; a constraint is satisfied all the same),
            "incomplete" (max_new_tokens, and the constraint is not satisfied), "dead" (nothing could follow, or nothing was found that can).
        reason: for the last two, at which token, and what was still allowed.
        preamble: what came up to and with the token that completed `start_after`.
        value: the parsed value for a JsonSchema, for a Substring the places (the first PLACES) where the text occurs, else None. None unless `ok`.
        log_z: log of an unbiased estimate of the probability that the model's own (warped) law gives to texts that satisfy the constraint. NaN at
            temperature 0, where there is no law.
        ess: effective sample size of the particles at the end.
        checks_per_token: calls of the constraint's check for each drawn token.
        resamplings: how often the particles were resampled.
        particles: all of them.
    """

    text: str
    tokens: tuple[int, ...]
    log_weight: float
    status: Status
    reason: str
    preamble: str
    value: Any
    log_z: float
    ess: float
    checks_per_token: float
    resamplings: int
    particles: tuple[Text, ...]

    @property
    def ok(self) -> bool:
        """Whether the text has ended and satisfies the constraint."""
        return self.status not in ("dead", "incomplete")

    @property
    def mass_kept(self) -> float:
        """exp(log_z): 1 where the model would have satisfied the constraint by itself, small where the constraint fights it."""
        return float(torch.tensor(self.log_z, dtype=torch.float64).exp())


class DeadEndError(HastenError):
    """No particle of some prompt reached the end. `results` are those of all prompts."""

    def __init__(self, message: str, results: list[Generated]):
        self.results = results
        super().__init__(message)


class Stream:
    """Pieces of text as they become certain. After the last one, `result` is the whole `Generated`."""

    def __init__(self, pieces: Callable[[Stream], Iterator[str]]):
        self.result: Generated | None = None
        self._pieces = pieces(self)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)


def generate(
    model: nn.Module,
    tokenizer,
    prompt: Prompt,
    *,
    constraint: Constraint | None = None,
    particles: int = 1,
    method: Method = "awrs",
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float | None = None,
    top_k: int | None = None,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] | None = None,
    stream: bool = False,
    start_after: str | None = None,
    on_dead: Literal["error", "return"] = "error",
    max_checks: int | None = None,
    extra_checks: int = 0,
    ess_threshold: float = 0.5,
    resampling: Scheme = "systematic",
    critic: Callable[[str], float] | None = None,
) -> Generated | list[Generated] | Stream:
    """Text that satisfies a constraint, drawn from the model's law of texts given the constraint.

    Tokens are drawn by adaptive weighted rejection sampling, each with an unbiased weight, and the particles of a prompt together by sequential Monte
    Carlo (`hasten.guidance.text.rejection`, `hasten.guidance.smc`). With one particle the text satisfies the constraint, and its law is that of token
    masks; with more it approaches the model's law given the constraint. Every step is one forward for all prompts and particles.

    The law is that of the model after repetition penalty, temperature, top_k and top_p, up to its end or to max_new_tokens tokens.

    Args:
        model, tokenizer: a causal language model of transformers, and its own tokenizer.
        prompt: a text, or chat messages (`[{"role": "user", "content": ...}]`); or a list of either, then the result is a list.
        constraint: what the text must satisfy; None: anything.
        particles: how many texts compete for each prompt.
        method: "awrs"; "mask": every draw from a mask over the whole vocabulary, which for a constraint that cannot fill one means a check of every
            token; "reject": from the model's own law, and a particle dies at the first token that the constraint refuses.
        temperature: 0 takes the likeliest allowed token, and top_k and top_p cut nothing then.
        seed: prompt i of a list gives what it gives alone with seed + i. None: from torch's own random numbers.
        stop: strings that end a text, which is cut before them. The text so far must satisfy the constraint then.
        stream: one prompt, one particle: an iterator of pieces of text, each given when nothing can change it any more.
        start_after: the constraint is about what follows the token that completes this string, such as "</think>".
        on_dead: whether a prompt none of whose particles reach the end raises an error, or gives a result with status "dead" or "incomplete".
        max_checks: "awrs": at most so many checks for a token. The weights stay unbiased, and a particle that needs more dies.
        extra_checks: "awrs": so many more checks for a token than needed, for weights of less variance.
        ess_threshold: resample below this share of effective particles: 0 never does (importance sampling).
        resampling: "systematic", "stratified", "multinomial" or "residual".
        critic: a log score of a text. It is a factor of the law of complete texts, and steers which prefixes survive before that.

    Raises:
        DeadEndError: see on_dead.
        ValueError: a setting that makes no sense, a prompt without tokens or too long for the model, a tokenizer that is not the model's, a constraint
            that is no constraint or that no text satisfies (`UnsatisfiableError`).
        PredicateError: a predicate raised; its error is the cause.
    """
    sampling = Sampling(
        particles, method, max_new_tokens, temperature, top_p, top_k, repetition_penalty, max_checks, extra_checks,
        ess_threshold, resampling, critic,
    )  # fmt: skip
    stops = tuple(stop) if isinstance(stop, Sequence) and not isinstance(stop, str) else () if stop is None else (stop,)
    _check_types(sampling, seed)
    _check(sampling, constraint, stops, start_after, on_dead)
    prompts, single = _prompts(prompt, tokenizer)
    if stream and not (single and particles == 1):
        raise ValueError(f"stream needs one prompt and one particle, got {len(prompts)} and {particles}")
    vocabulary = vocabulary_of(tokenizer, model)
    check_lengths(model, prompts, max_new_tokens)
    bound = constraint.bind(vocabulary) if constraint is not None else None
    if start_after is not None:
        bound = After(bound, start_after)
    first = int(torch.randint(2**62, ())) if seed is None else seed
    seeds = [(first + place) % 2**63 for place in range(len(prompts))]
    run = Run(Decoder(model), vocabulary, prompts, constraint, bound, Stops(stops), sampling, seeds)
    if stream:
        return Stream(lambda stream: _stream(stream, run, constraint, Stops(stops), on_dead))
    for _ in run:
        pass
    results = _results(run, constraint)
    _refuse_dead(results, on_dead)
    return results[0] if single else results


def _stream(stream: Stream, run: Run, constraint: Constraint | None, stops: Stops, on_dead: str) -> Iterator[str]:
    printer, particle = Printer(), run.particles[0]
    for _ in run:
        certain = stops.certain(particle.text) if particle.status is None else len(particle.text)
        if piece := printer.print(particle.text, certain):
            yield piece
    if piece := printer.print(particle.text, len(particle.text), final=True):
        yield piece
    results = _results(run, constraint)
    stream.result = results[0]
    _refuse_dead(results, on_dead)


def _results(run: Run, constraint: Constraint | None) -> list[Generated]:
    count = run.population.log_weights.shape[1]
    return [
        _result(run, prompt, run.particles[prompt * count : (prompt + 1) * count], constraint)
        for prompt in range(len(run.generators))
    ]


def _result(run: Run, prompt: int, particles: list[Particle], constraint: Constraint | None) -> Generated:
    log_weights = run.population.log_weights[prompt]
    if log_weights.isfinite().any():
        chosen = int(sample(log_weights[None], uniforms(1, 1, run.generators[prompt])))
    else:
        chosen = max(range(len(particles)), key=lambda i: len(particles[i].tokens))
    log_z = float(run.population.log_z()[prompt])
    if run.sampling.greedy and constraint is not None:
        log_weights, log_z = torch.full_like(log_weights, math.nan), math.nan
    texts = tuple(
        Text(particle.text.decode("utf-8", "replace"), tuple(particle.tokens), weight, particle.status)
        for particle, weight in zip(particles, log_weights.tolist(), strict=True)
    )
    particle, text = particles[chosen], texts[chosen]
    drawn = sum(len(each.tokens) for each in particles)
    ok = text.status not in ("dead", "incomplete")
    return Generated(
        text=text.text,
        tokens=text.tokens,
        log_weight=text.log_weight,
        status=text.status,
        reason=particle.reason,
        preamble=particle.preamble.decode("utf-8", "replace"),
        value=_value(constraint, text.text) if ok else None,
        log_z=log_z,
        ess=float(run.population.effective_sample_size()[prompt]),
        checks_per_token=sum(each.checks for each in particles) / max(drawn, 1),
        resamplings=run.resamplings[prompt],
        particles=texts,
    )


def _value(constraint: Constraint | None, text: str) -> Any:
    parts = constraint.parts if isinstance(constraint, Conjunction) else (constraint,)
    for part in parts:
        if isinstance(part, JsonSchema):
            return json.loads(text)
        if isinstance(part, Substring):
            return part.places(text, PLACES)
    return None


def _refuse_dead(results: list[Generated], on_dead: str) -> None:
    dead = [place for place, result in enumerate(results) if not result.ok]
    if dead and on_dead == "error":
        where = f"prompt {dead[0]}: " if len(results) > 1 else ""
        count = len(results[dead[0]].particles)
        others = f"; nor did the other {count - 1} particles reach an end" if count > 1 else ""
        raise DeadEndError(f"dead end {where}{results[dead[0]].reason}{others}", results)


def _prompts(prompt: Prompt, tokenizer) -> tuple[list[list[int]], bool]:
    """The token ids of each prompt, and whether there is one that stands alone."""
    if isinstance(prompt, str) or (_is_list(prompt) and prompt and isinstance(prompt[0], dict)):
        return [_ids(prompt, tokenizer)], True
    if not _is_list(prompt):
        raise ValueError(f"prompt must be a text, chat messages or a list of these, got {type(prompt).__name__}")
    if not prompt:
        raise ValueError("prompt is an empty list")
    return [_ids(each, tokenizer) for each in prompt], False


def _ids(prompt, tokenizer) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt, verbose=False)["input_ids"]
    if _is_list(prompt) and prompt and all(isinstance(message, dict) for message in prompt):
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    raise ValueError(f"prompt must be a text or a list of chat messages, got {prompt!r:.60}")


def _is_list(value) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _check_types(sampling: Sampling, seed: int | None) -> None:
    optional = ("top_k", "top_p", "max_checks", "seed")
    settings = {name: getattr(sampling, name) for name in Sampling.__dataclass_fields__} | {"seed": seed}
    for kind, what, names in (
        (Integral, "an integer", ("particles", "max_new_tokens", "top_k", "max_checks", "extra_checks", "seed")),
        (Real, "a number", ("temperature", "top_p", "repetition_penalty", "ess_threshold")),
    ):
        for name in names:
            value = settings[name]
            if not (isinstance(value, kind) or (value is None and name in optional)):
                raise ValueError(f"{name} must be {what}{', or None' if name in optional else ''}, got {value!r:.60}")
    if sampling.critic is not None and not callable(sampling.critic):
        raise ValueError(f"critic must be a function from a text to a log score, got {sampling.critic!r:.60}")


def _check(sampling: Sampling, constraint, stops: tuple[str, ...], start_after: str | None, on_dead: str) -> None:
    for name in ("particles", "max_new_tokens"):
        if getattr(sampling, name) < 1:
            raise ValueError(f"{name} must be 1 or more, got {getattr(sampling, name)}")
    check_warp(sampling.temperature, sampling.top_k, sampling.top_p, sampling.repetition_penalty)
    if sampling.greedy and sampling.particles > 1:
        raise ValueError(f"temperature 0 takes one text, particles={sampling.particles} would all be the same")
    if not 0 <= sampling.ess_threshold <= 1:
        raise ValueError(f"ess_threshold must be between 0 and 1, got {sampling.ess_threshold}")
    choices = {"method": (sampling.method, METHODS), "resampling": (sampling.resampling, SCHEMES)}
    for name, (value, known) in (choices | {"on_dead": (on_dead, ("error", "return"))}).items():
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if constraint is not None and not isinstance(constraint, Constraint):
        raise ValueError(f"constraint must be a Constraint such as hasten.Regex(...), got {constraint!r:.60}")
    if start_after is not None and (constraint is None or not start_after or not isinstance(start_after, str)):
        raise ValueError(f"start_after={start_after!r} says where a constraint begins: give a marker and a constraint")
    for string in stops:
        if not isinstance(string, str) or not string:
            raise ValueError(f"stop must be strings that are not empty, got {string!r}")
    if sampling.max_checks is not None and sampling.max_checks < 1:
        raise ValueError(f"max_checks must be 1 or more, or None, got {sampling.max_checks}")
    if sampling.extra_checks < 0:
        raise ValueError(f"extra_checks must be 0 or more, got {sampling.extra_checks}")
    if sampling.method != "awrs" and (sampling.max_checks is not None or sampling.extra_checks):
        raise ValueError(f"max_checks and extra_checks are settings of method 'awrs', not of {sampling.method!r}")
