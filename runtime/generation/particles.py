"""The loop of constrained generation: particles that grow token by token, weighted, and resampled where their weights part."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import torch

from hasten.generation.decoder import Decoder
from hasten.generation.text import BYTES, Stops, Waiting, holds
from hasten.guidance.smc import Population, Scheme
from hasten.guidance.text.constraints import BoundConstraint, Constraint
from hasten.guidance.text.rejection import MASK_AFTER, Draw, draw
from hasten.guidance.text.vocabulary import Vocabulary
from hasten.guidance.text.warp import warp

Method = Literal["awrs", "mask", "reject"]
Status = Literal["complete", "stopped", "length", "incomplete", "dead"]

METHODS = ("awrs", "mask", "reject")
SHOWN = 80
# A mask says how much of the law is valid. Where it was less than this, a walk would have ended at the mask too: the next token needs no walk.
LITTLE_MASS = -math.log(MASK_AFTER)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn, how particles are kept; the arguments of `hasten.generate` of the same names."""

    particles: int
    method: Method
    max_new_tokens: int
    temperature: float
    top_p: float | None
    top_k: int | None
    repetition_penalty: float
    max_checks: int | None
    extra_checks: int
    ess_threshold: float
    resampling: Scheme
    critic: Callable[[str], float] | None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(slots=True)
class Particle:
    """One text in the making.

    prompt: which of the prompts it continues. tokens: what was drawn, EOS too. text: the bytes that the constraint is about, without EOS and without a
    stop string; preamble: those before, if there is a marker to wait for. status: None while it grows. reason: why it died, in words.
    mask_first: whether the next token is drawn by a mask at once.
    """

    prompt: int
    state: Any = None
    tokens: list[int] = field(default_factory=list)
    text: bytes = b""
    preamble: bytes = b""
    checks: int = 0
    status: Status | None = None
    reason: str = ""
    score: tuple[bytes, float] | None = None
    mask_first: bool = False


class Run:
    """One call: P prompts with N particles each, in one batch.

    Particle n of prompt p is number p N + n everywhere; its row in the decoder's batch is `_rows` of it. Each prompt has its own random numbers, so that
    it gives what it would give alone.
    """

    def __init__(
        self,
        decoder: Decoder,
        vocabulary: Vocabulary,
        prompts: list[list[int]],
        constraint: Constraint | None,
        bound: BoundConstraint | None,
        stops: Stops,
        sampling: Sampling,
        seeds: list[int],
    ):
        count = sampling.particles
        self.population = Population(len(prompts), count)
        self.resamplings = [0] * len(prompts)
        self.particles = [
            Particle(prompt, bound.start() if bound else None) for prompt in range(len(prompts)) for _ in range(count)
        ]
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._decoder, self._vocabulary, self._prompts = decoder, vocabulary, prompts
        self._constraint, self._bound, self._stops, self.sampling = constraint, bound, stops, sampling
        self._rows = [particle.prompt for particle in self.particles]

    def __iter__(self) -> Iterator[None]:
        """Draws one token for every particle that still grows, again and again; all have a status at the end."""
        sampling = self.sampling
        logits = self._decoder.prefill(self._prompts)
        for position in range(sampling.max_new_tokens):
            growing = [i for i, particle in enumerate(self.particles) if particle.status is None]
            if not growing:
                break
            if position:
                tokens = [self.particles[i].tokens[-1] for i in growing]
                logits = self._decoder.step(tokens, [self._rows[i] for i in growing])
                rows = range(len(growing))
                self._rows = [-1] * len(self.particles)
                for row, i in enumerate(growing):
                    self._rows[i] = row
            else:
                rows = [self._rows[i] for i in growing]
            self._grow(growing, logits if len(rows) == len(logits) else logits[rows])
            if position == sampling.max_new_tokens - 1:
                self._end_all()
            self._resample()
            yield

    def _grow(self, growing: list[int], logits: torch.Tensor) -> None:
        """One token for each particle of `growing`, whose laws are the rows of `logits`."""
        drawn = self._draw(growing, self._law(growing, logits))
        increments = torch.zeros(len(self.particles), dtype=torch.float64)
        weights, checks, masked = drawn.log_weight.tolist(), drawn.checks.tolist(), drawn.masked.tolist()
        for i, token, weight, checked, by_mask, status in zip(
            growing, drawn.token.tolist(), weights, checks, masked, drawn.status, strict=True
        ):
            particle = self.particles[i]
            particle.checks += checked
            particle.mask_first = by_mask and weight < LITTLE_MASS
            if status == "accepted":
                increments[i] = 0.0 if self.sampling.greedy else weight
                self._append(particle, token)
            else:
                _kill(particle, self._why(particle, status))
            if particle.status == "dead":
                increments[i] = -math.inf
        self.population.reweight(increments.view_as(self.population.log_weights))

    def _law(self, growing: list[int], logits: torch.Tensor) -> torch.Tensor:
        sampling = self.sampling
        logits = logits[:, : len(self._vocabulary)]
        seen = None
        if sampling.repetition_penalty != 1:
            seen = torch.zeros(logits.shape, dtype=torch.bool)
            for row, i in enumerate(growing):
                particle = self.particles[i]
                ids = torch.tensor(self._prompts[particle.prompt] + particle.tokens)
                seen[row, ids[ids < logits.shape[1]]] = True
            seen = seen.to(logits.device)
        return warp(
            logits,
            temperature=sampling.temperature,
            top_k=None if sampling.greedy else sampling.top_k,
            top_p=None if sampling.greedy else sampling.top_p,
            repetition_penalty=sampling.repetition_penalty,
            seen=seen,
        )

    def _draw(self, growing: list[int], law: torch.Tensor) -> Draw:
        sampling, bound = self.sampling, self._bound
        states = [self.particles[i].state for i in growing]
        generators = [self.generators[self.particles[i].prompt] for i in growing]
        if bound is None or sampling.method == "reject":
            return draw(law, None, generator=generators, greedy=sampling.greedy)
        mask_first = [sampling.method == "mask" or self.particles[i].mask_first for i in growing]
        masks = None
        if sampling.method == "mask" or bound.can_fill_mask:
            masks = [partial(self._fill, self.particles[i]) for i in growing]
        return draw(
            law,
            lambda row, token: bound.check(states[row], token),
            generator=generators,
            max_checks=sampling.max_checks,
            extra_checks=sampling.extra_checks,
            fill_masks=masks,
            mask_after=[0 if first else MASK_AFTER for first in mask_first],
            greedy=sampling.greedy,
        )

    def _fill(self, particle: Particle, mask: np.ndarray) -> None:
        particle.checks += fill_mask(self._bound, particle.state, mask)

    def _append(self, particle: Particle, token: int) -> None:
        bound, text = self._bound, self._vocabulary.tokens[token]
        if bound and self.sampling.method == "reject":
            particle.checks += 1
            if not bound.check(particle.state, token):
                went_on = f"the model went on with {text.decode('utf-8', 'replace')!r}, which the constraint refuses"
                return _kill(particle, f"{_where(particle)}: {went_on}")
        particle.tokens.append(token)
        if token in self._vocabulary.eos:
            particle.status = "complete"
            return
        waiting = isinstance(particle.state, Waiting)
        if bound:
            particle.state = bound.advance(particle.state, token)
        if waiting:
            particle.preamble += text
        elif token not in self._vocabulary.special:
            known = len(particle.text)
            particle.text += text
            place = self._stops.find(particle.text, known)
            if place is not None:
                self._stop(particle, place)

    def _stop(self, particle: Particle, place: int) -> None:
        """Ends a text before a stop string. What the constraint says of the text without it is asked anew: tokens may reach across the border."""
        particle.text = particle.text[:place]
        if self._constraint is not None and not holds(self._constraint_on_bytes, particle.text):
            return _kill(particle, f"{_where(particle)}: a stop string, but the text does not satisfy the constraint")
        particle.status = "stopped"

    @cached_property
    def _constraint_on_bytes(self) -> BoundConstraint:
        return self._constraint.bind(BYTES)

    def _end_all(self) -> None:
        """At the limit of tokens, a text that does not satisfy the constraint counts for nothing."""
        bound = self._bound
        increments = torch.zeros(len(self.particles), dtype=torch.float64)
        for i, particle in enumerate(self.particles):
            if particle.status is not None:
                continue
            particle.status = "length"
            if bound and not bound.complete(particle.state):
                particle.status, increments[i] = "incomplete", -math.inf
                particle.reason = (
                    f"{_where(particle)}: max_new_tokens={self.sampling.max_new_tokens} is reached and the text is not complete, the constraint "
                    f"allows {bound.allowed_text(particle.state)}"
                )
        self.population.reweight(increments.view_as(self.population.log_weights))

    def _resample(self) -> None:
        sampling, population = self.sampling, self.population
        if sampling.critic is not None:
            scores = [self._score(particle) for particle in self.particles]
            population.twist(torch.tensor(scores, dtype=torch.float64).view_as(population.log_weights))
            for particle, score in zip(self.particles, scores, strict=True):
                if score == -math.inf:
                    _kill(particle, f"{_where(particle)}: the critic gives the text no weight")
        count = sampling.particles
        if count == 1 or sampling.method == "reject":
            return
        growing = torch.tensor([particle.status is None for particle in self.particles]).view(-1, count).any(-1)
        parents = population.resample(sampling.ess_threshold, sampling.resampling, self.generators, growing)
        before, rows = self.particles, self._rows
        for prompt, own in enumerate(parents.tolist()):
            if own == list(range(count)):
                continue
            self.resamplings[prompt] += 1
            first = prompt * count
            self.particles[first : first + count] = [self._fork(before[first + parent]) for parent in own]
            self._rows[first : first + count] = [rows[first + parent] for parent in own]

    def _fork(self, particle: Particle) -> Particle:
        state = self._bound.fork(particle.state) if self._bound else None
        return replace(particle, state=state, tokens=list(particle.tokens))

    def _score(self, particle: Particle) -> float:
        """The critic's log score of the present text; 0 for the dead, whom it is not asked about."""
        if particle.status in ("dead", "incomplete"):
            return 0.0
        if particle.score is None or particle.score[0] != particle.text:
            text = particle.text.decode("utf-8", "replace")
            answer = self.sampling.critic(text)
            try:
                score = float(answer)
            except (TypeError, ValueError):
                score = math.nan
            if math.isnan(score) or score == math.inf:
                raise ValueError(f"critic must return a log score below infinity, got {answer!r} for the text {text!r}")
            particle.score = particle.text, score
        return particle.score[1]

    def _why(self, particle: Particle, status: str) -> str:
        """What a draw without a token means."""
        if self._bound is None:
            return f"{_where(particle)}: the model gives no token any probability"
        if status == "budget_spent":
            checks = self.sampling.max_checks
            return f"{_where(particle)}: none of max_checks={checks} drawn tokens satisfies the constraint"
        allowed = self._bound.allowed_text(particle.state)
        return f"{_where(particle)}: the model gives no probability to what the constraint allows ({allowed})"


def fill_mask(bound: BoundConstraint, state: Any, mask: np.ndarray) -> int:
    """Fills an int32 mask [ceil(V / 32)] of zeros, by a check of every token where the constraint has no faster way. Returns how many checks that took."""
    if bound.fill_mask(state, mask):
        return 0
    bits = mask.view(np.uint32)
    for token in range(len(bound.vocabulary)):
        if bound.check(state, token):
            bits[token >> 5] |= np.uint32(1 << (token & 31))
    return len(bound.vocabulary)


def _kill(particle: Particle, reason: str) -> None:
    particle.status, particle.reason = "dead", reason


def _where(particle: Particle) -> str:
    text = (particle.preamble + particle.text).decode("utf-8", "replace")
    return f"at token {len(particle.tokens)}, after {text if len(text) <= SHOWN else '…' + text[-SHOWN:]!r}"
