"""`hasten.generate`: text under a constraint, from the model's own law given that constraint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import nn

from hasten.generation.decoder import CachedDecoder
from hasten.generation.prompts import Prompt, check_lengths, tokenize_prompts
from hasten.generation.results import Generated, refuse_dead, results_of
from hasten.generation.stream import Stream
from hasten.generation.tokenizer import vocabulary_of
from hasten.guidance.smc import Scheme
from hasten.guidance.text.constraints import Constraint
from hasten.guidance.text.particles import ParticleFilter
from hasten.guidance.text.sampling import Method, Sampling, check_choice, check_integer


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

    Tokens are drawn by adaptive weighted rejection sampling, each with an unbiased weight, and the particles of a
    prompt together by sequential Monte Carlo (`hasten.guidance.text.rejection`, `hasten.guidance.smc`). With one
    particle the text satisfies the constraint, and its law is that of token masks; with more it approaches the model's
    law given the constraint. Every step is one forward for all prompts and particles.

    The law is that of the model after repetition penalty, temperature, top_k and top_p, up to its end or to
    max_new_tokens tokens.

    Args:
        model, tokenizer: a causal language model of transformers, and its own tokenizer.
        prompt: a text, or chat messages (`[{"role": "user", "content": ...}]`); or a list of either, then the result is
            a list.
        constraint: what the text must satisfy; None: anything.
        particles: how many texts compete for each prompt.
        method: "awrs"; "mask": every draw from a mask over the whole vocabulary, which for a constraint that cannot
            fill one means a check of every token; "reject": from the model's own law, and a particle dies at the first
            token that the constraint refuses.
        temperature: 0 takes the likeliest allowed token, and top_k and top_p cut nothing then.
        seed: prompt i of a list gives what it gives alone with seed + i. None: from torch's own random numbers.
        stop: strings that end a text, which is cut before them. The text so far must satisfy the constraint then.
        stream: one prompt, one particle: an iterator of pieces of text, each given when nothing can change it any more.
        start_after: the constraint is about what follows the token that completes this string, such as "</think>".
        on_dead: whether a prompt none of whose particles reach the end raises an error, or gives a result with status
            "dead" or "incomplete".
        max_checks: "awrs": at most so many checks for a token. The weights stay unbiased, and a particle that needs
            more dies.
        extra_checks: "awrs": so many more checks for a token than needed, for weights of less variance.
        ess_threshold: resample below this share of effective particles: 0 never does (importance sampling).
        resampling: "systematic", "stratified", "multinomial" or "residual".
        critic: a log score of a text. It is a factor of the law of complete texts, and steers which prefixes survive
            before that.

    Raises:
        DeadEndError: see on_dead.
        ValueError: a setting that makes no sense, a prompt without tokens or too long for the model, a tokenizer that
            is not the model's, a constraint that is no constraint or that no text satisfies (`UnsatisfiableError`).
        PredicateError: a predicate raised; its error is the cause.
    """
    sampling = Sampling(
        particles=particles,
        method=method,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        max_checks=max_checks,
        extra_checks=extra_checks,
        ess_threshold=ess_threshold,
        resampling=resampling,
        critic=critic,
    )
    stops = tuple(stop) if isinstance(stop, Sequence) and not isinstance(stop, str) else () if stop is None else (stop,)
    check_integer("seed", seed, optional=True)
    check_choice("on_dead", on_dead, ("error", "return"))
    prompts, single = tokenize_prompts(prompt, tokenizer)
    if stream and not (single and particles == 1):
        raise ValueError(f"stream needs one prompt and one particle, got {len(prompts)} and {particles}")
    vocabulary = vocabulary_of(tokenizer, model)
    check_lengths(model, prompts, max_new_tokens)
    first = int(torch.randint(2**62, ())) if seed is None else seed
    texts = ParticleFilter(
        CachedDecoder(model),
        vocabulary,
        prompts,
        sampling,
        seeds=[(first + place) % 2**63 for place in range(len(prompts))],
        constraint=constraint,
        start_after=start_after,
        stops=stops,
    )
    if stream:
        return Stream(texts, constraint, stops, on_dead)
    for _ in texts:
        pass
    results = results_of(texts, constraint)
    refuse_dead(results, on_dead)
    return results[0] if single else results
