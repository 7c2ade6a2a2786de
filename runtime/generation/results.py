"""What `hasten.generate` gives, and the error where there is nothing to give."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from hasten.errors import HastenError
from hasten.guidance.text.constraints import Constraint
from hasten.guidance.text.particles import ParticleFilter
from hasten.guidance.text.texts import Status


@dataclass(frozen=True, slots=True)
class Text:
    """One particle at the end.

    text: what was generated, without EOS, without a stop string, and without the preamble.
    tokens: the ids that were drawn, EOS and those of the preamble too.
    log_weight: log of its weight; -inf for a dead one.
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
        status: "complete" (the model ended the text), "stopped" (a stop string), "length" (max_new_tokens; a constraint
            is satisfied all the same), "incomplete" (max_new_tokens, and the constraint is not satisfied), "dead"
            (nothing could follow, or nothing was found that can).
        reason: for the last two, at which token, and what was still allowed.
        preamble: what came up to and with the token that completed `start_after`.
        value: what the constraint makes of the text: parsed JSON for a JsonSchema, the places for a Substring, of a
            conjunction the first part's that has one. Else None, and None unless `ok`.
        log_z: log of an unbiased estimate of the probability that the model's own (warped) law gives to texts that
            satisfy the constraint. NaN at temperature 0, where there is no law.
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
        """exp(log_z): 1 where the model satisfies the constraint by itself, small where the constraint fights it."""
        return float(torch.tensor(self.log_z, dtype=torch.float64).exp())


class DeadEndError(HastenError):
    """No particle of some prompt reached the end. `results` are those of all prompts."""

    def __init__(self, message: str, results: list[Generated]):
        self.results = results
        super().__init__(message)


def results_of(texts: ParticleFilter, constraint: Constraint | None) -> list[Generated]:
    """One result for each prompt of a particle filter that has come to its end."""
    return [_result(texts, prompt, constraint) for prompt in range(len(texts.resamplings))]


def refuse_dead(results: list[Generated], on_dead: str) -> None:
    """Raises a DeadEndError for the first prompt without a text, unless such prompts are to be returned."""
    dead = [place for place, result in enumerate(results) if not result.ok]
    if dead and on_dead == "error":
        where = f"prompt {dead[0]}: " if len(results) > 1 else ""
        count = len(results[dead[0]].particles)
        others = f"; nor did the other {count - 1} particles reach an end" if count > 1 else ""
        raise DeadEndError(f"dead end {where}{results[dead[0]].reason}{others}", results)


def _result(texts: ParticleFilter, prompt: int, constraint: Constraint | None) -> Generated:
    chosen, particles = texts.choose(prompt), texts.of_prompt(prompt)
    log_weights, log_z = texts.population.log_weights[prompt], float(texts.population.log_z()[prompt])
    if texts.sampling.greedy and constraint is not None:
        log_weights, log_z = torch.full_like(log_weights, math.nan), math.nan
    all_texts = tuple(
        Text(particle.text.decode("utf-8", "replace"), tuple(particle.tokens), weight, particle.status)
        for particle, weight in zip(particles, log_weights.tolist(), strict=True)
    )
    particle, text = particles[chosen], all_texts[chosen]
    drawn = sum(len(each.tokens) for each in particles)
    ok = text.status not in ("dead", "incomplete")
    return Generated(
        text=text.text,
        tokens=text.tokens,
        log_weight=text.log_weight,
        status=text.status,
        reason=particle.reason,
        preamble=particle.preamble.decode("utf-8", "replace"),
        value=constraint.value(text.text) if ok and constraint is not None else None,
        log_z=log_z,
        ess=float(texts.population.effective_sample_size()[prompt]),
        checks_per_token=sum(each.checks for each in particles) / max(drawn, 1),
        resamplings=texts.resamplings[prompt],
        particles=all_texts,
    )
