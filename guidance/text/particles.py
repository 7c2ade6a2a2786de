"""The law of constrained generation: particles that grow token by token, weighted, resampled where their weights part.

Sequential Monte Carlo (`hasten.guidance.smc`) over draws by adaptive weighted rejection sampling, or by masks
(`hasten.guidance.text.rejection`). What predicts the tokens is any `Decoder`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch

from hasten.guidance.inverse_cdf import uniforms
from hasten.guidance.smc import Population
from hasten.guidance.text.categorical import sample
from hasten.guidance.text.constraints.base import Constraint
from hasten.guidance.text.rejection import MASK_AFTER, Draw, draw
from hasten.guidance.text.sampling import Sampling
from hasten.guidance.text.texts import Particle, Texts
from hasten.guidance.text.vocabulary import Vocabulary
from hasten.guidance.text.warp import warp

# A mask says how much of the law is valid. Where that is less than 1 / MASK_AFTER, a walk is likely to end at the mask
# too: the next token is drawn by a mask at once.
LITTLE_MASS = -math.log(MASK_AFTER)


class Decoder(Protocol):
    """A language model that continues many texts at once: they are the rows of its batch."""

    def prefill(self, prompts: list[list[int]]) -> torch.Tensor:
        """Reads the P prompts, which become rows 0..P - 1: logits [P, W] of what follows each, W at
        least the V tokens."""

    def step(self, tokens: list[int], rows: list[int]) -> torch.Tensor:
        """Reads one more token for each of R texts, which become rows 0..R - 1: logits [R, W] of what follows each.

        Args:
            tokens: the R tokens.
            rows: the rows so far that the R texts continue; a row may be continued several times, or not at all.
        """


class ParticleFilter:
    """P prompts with N particles each, in one batch. Iterate over it: every step draws one token for each particle.

    Particle n of prompt p is number p N + n everywhere; its row in the decoder's batch is `_rows` of it. Each prompt
    has its own random numbers, so that it gives what it would give alone.

    Args:
        decoder: what predicts.
        vocabulary: its V tokens; logits beyond them are of padding.
        prompts: P lists of token ids, none empty.
        sampling: how tokens are drawn and particles kept.
        seeds: of the random numbers, one for each prompt.
        constraint: what the texts must satisfy; None: anything.
        start_after: the constraint is about what follows the token that completes this string.
        stops: strings that end a text, which is cut before them.

    Attributes:
        particles: P N of them; all have a status at the end.
        population: their weights.
        resamplings: for each prompt, how often its particles were resampled.

    Raises:
        ValueError: as `Texts`; another number of seeds than prompts.
        UnsatisfiableError: no text satisfies the constraint.
    """

    def __init__(
        self,
        decoder: Decoder,
        vocabulary: Vocabulary,
        prompts: list[list[int]],
        sampling: Sampling,
        *,
        seeds: Sequence[int],
        constraint: Constraint | None = None,
        start_after: str | None = None,
        stops: tuple[str, ...] = (),
    ):
        if len(seeds) != len(prompts):
            raise ValueError(f"seeds must be one for each prompt, got {len(seeds)} for {len(prompts)} prompts")
        self._texts = Texts(vocabulary, constraint, start_after, stops)
        self._decoder, self._vocabulary, self._prompts, self.sampling = decoder, vocabulary, prompts, sampling
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.population = Population(len(prompts), sampling.particles)
        self.resamplings = [0] * len(prompts)
        self.particles = [
            self._texts.start(prompt) for prompt in range(len(prompts)) for _ in range(sampling.particles)
        ]
        self._rows = [particle.prompt for particle in self.particles]

    def of_prompt(self, prompt: int) -> list[Particle]:
        """The N particles of a prompt."""
        count = self.sampling.particles
        return self.particles[prompt * count : (prompt + 1) * count]

    def choose(self, prompt: int) -> int:
        """Which of a prompt's particles stands for them: one drawn by weight, or the longest where all are dead."""
        log_weights = self.population.log_weights[prompt]
        if log_weights.isfinite().any():
            return int(sample(log_weights[None], uniforms(1, 1, self._generators[prompt])))
        particles = self.of_prompt(prompt)
        return max(range(len(particles)), key=lambda i: len(particles[i].tokens))

    def __iter__(self) -> Iterator[None]:
        """Draws one token for every particle that still grows, again and again; all have a status at the end."""
        last = self.sampling.max_new_tokens - 1
        logits = self._decoder.prefill(self._prompts)[self._rows]
        for position in range(last + 1):
            growing = [i for i, particle in enumerate(self.particles) if particle.status is None]
            if not growing:
                break
            if position:
                tokens = [self.particles[i].tokens[-1] for i in growing]
                logits = self._decoder.step(tokens, [self._rows[i] for i in growing])
                self._rows = [-1] * len(self.particles)
                for row, i in enumerate(growing):
                    self._rows[i] = row
            self._grow(growing, logits)
            if position == last:
                self._end_all()
            self._resample()
            yield

    def _grow(self, growing: list[int], logits: torch.Tensor) -> None:
        """One token for each particle of `growing`, whose laws are the rows of `logits`."""
        drawn = self._draw(growing, self._law(growing, logits))
        increments = torch.zeros(len(self.particles), dtype=torch.float64)
        weights, checks, masked = drawn.log_weight.tolist(), drawn.checks.tolist(), drawn.masked.tolist()
        for i, token, weight, checked, by_mask, end in zip(
            growing, drawn.token.tolist(), weights, checks, masked, drawn.end, strict=True
        ):
            particle = self.particles[i]
            particle.checks += checked
            particle.mask_first = by_mask and weight < LITTLE_MASS
            if end == "accepted":
                increments[i] = 0.0 if self.sampling.greedy else weight
                self._append(particle, token)
            else:
                particle.die(self._why(particle, end))
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
        sampling, bound = self.sampling, self._texts.bound
        states = [self.particles[i].state for i in growing]
        generators = [self._generators[self.particles[i].prompt] for i in growing]
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
        particle.checks += self._texts.bound.fill_mask_or_check(particle.state, mask)

    def _append(self, particle: Particle, token: int) -> None:
        """Adds a token that was drawn; by method "reject" from the model's own law, and the constraint is asked now."""
        if self._texts.bound is not None and self.sampling.method == "reject":
            particle.checks += 1
            if not self._texts.bound.check(particle.state, token):
                text = self._vocabulary.tokens[token].decode("utf-8", "replace")
                return particle.die(f"the model went on with {text!r}, which the constraint refuses")
        self._texts.append(particle, token)

    def _end_all(self) -> None:
        """At the limit of tokens, a text that does not satisfy the constraint counts for nothing."""
        increments = torch.zeros(len(self.particles), dtype=torch.float64)
        for i, particle in enumerate(self.particles):
            if particle.status is None:
                self._texts.end(particle, self.sampling.max_new_tokens)
                increments[i] = -math.inf if particle.status == "incomplete" else 0.0
        self.population.reweight(increments.view_as(self.population.log_weights))

    def _resample(self) -> None:
        sampling, population = self.sampling, self.population
        if sampling.critic is not None:
            scores = [self._score(particle) for particle in self.particles]
            population.twist(torch.tensor(scores, dtype=torch.float64).view_as(population.log_weights))
            for particle, score in zip(self.particles, scores, strict=True):
                if score == -math.inf:
                    particle.die("the critic gives the text no weight")
        count = sampling.particles
        if count == 1 or sampling.method == "reject":
            return
        growing = torch.tensor([particle.status is None for particle in self.particles]).view(-1, count).any(-1)
        parents = population.resample(sampling.ess_threshold, sampling.resampling, self._generators, growing)
        before, rows = self.particles, self._rows
        for prompt, own in enumerate(parents.tolist()):
            if own == list(range(count)):
                continue
            self.resamplings[prompt] += 1
            first = prompt * count
            self.particles[first : first + count] = [self._texts.fork(before[first + parent]) for parent in own]
            self._rows[first : first + count] = [rows[first + parent] for parent in own]

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

    def _why(self, particle: Particle, end: str) -> str:
        """What a draw without a token means."""
        if self._texts.bound is None:
            return "the model gives no token any probability"
        if end == "budget_spent":
            checks = self.sampling.max_checks
            return f"none of max_checks={checks} drawn tokens satisfies the constraint"
        allowed = self._texts.bound.allowed_text(particle.state)
        return f"the model gives no probability to what the constraint allows ({allowed})"
