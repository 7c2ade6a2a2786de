"""Measured speed and measured drift of a model, in decode as users run it: a prefill, then one token after the other."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from hasten.acceleration.anatomy import Projection
from hasten.acceleration.calibration import longest_input, progress
from hasten.kernels.linear import linear
from hasten.kernels.storage import MAX_BATCH

PREFILL_TOKENS, DECODE_TOKENS = 128, 24
DRIFT_PREFIX, DRIFT_TOKENS = 16, 256


@dataclass(frozen=True, slots=True)
class Speed:
    """Median seconds of one decode step (batch 1) and of a prefill of PREFILL_TOKENS tokens."""

    decode_seconds: float
    prefill_seconds: float


@dataclass(frozen=True, slots=True)
class Drift:
    """How far the fast model's predictions are from the dense model's on held-out text, in decode.

    `kl` is KL(dense || fast) in nats per token, `top1` the share of tokens where both prefer the same next token.
    """

    kl: float
    top1: float
    dense_perplexity: float
    fast_perplexity: float
    tokens: int


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cache_of(output) -> dict[str, object]:
    """The cache in a model's output, by the name of the argument that takes it: Mamba-2 calls it `cache_params`."""
    name = "past_key_values" if hasattr(output, "past_key_values") else "cache_params"
    return {name: getattr(output, name)}


@torch.no_grad()
def decode_logits(model: nn.Module, ids: torch.Tensor, prefix: int) -> torch.Tensor:
    """Logits [T - prefix + 1, V] in float32 that follow positions prefix - 1 .. T - 1 of `ids` [T]: a prefill of `prefix` tokens, then single steps."""
    ids = ids.to(device_of(model))[None]
    output = model(input_ids=ids[:, :prefix], use_cache=True)
    rows = [output.logits[0, -1].float()]
    for position in range(prefix, ids.shape[1]):
        output = model(input_ids=ids[:, position : position + 1], use_cache=True, **cache_of(output))
        rows.append(output.logits[0, -1].float())
    return torch.stack(rows).cpu()


def heldout_logits(
    model: nn.Module, pieces: list[torch.Tensor], tokens: int = DRIFT_TOKENS
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For windows of held-out text: (ids that come next [T - prefix], the model's decode logits for them [T - prefix, V]), up to `tokens` in all."""
    results, done = [], 0
    for piece in progress(pieces, "measuring drift", unit="window"):
        if done >= tokens:
            break
        prefix = min(DRIFT_PREFIX, piece.numel() // 2)
        piece = piece[: prefix + tokens - done]
        results.append((piece[prefix:], decode_logits(model, piece[:-1], prefix)))
        done += piece.numel() - prefix
    return results


def drift(dense: list[tuple[torch.Tensor, torch.Tensor]], fast: list[tuple[torch.Tensor, torch.Tensor]]) -> Drift:
    """Compares the results of `heldout_logits` of two models on the same windows."""
    targets = torch.cat([ids for ids, _ in dense])
    p = torch.cat([F.log_softmax(logits, -1) for _, logits in dense])
    q = torch.cat([F.log_softmax(logits, -1) for _, logits in fast])
    kl = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    return Drift(
        kl=float(kl.mean()),
        top1=float((p.argmax(-1) == q.argmax(-1)).float().mean()),
        dense_perplexity=float(F.nll_loss(p, targets).exp()),
        fast_perplexity=float(F.nll_loss(q, targets).exp()),
        tokens=targets.numel(),
    )


@torch.no_grad()
def speed(model: nn.Module, vocabulary: int) -> Speed:
    """Times prefill and decode on random tokens, medians after a warm-up; the prefill is shorter for a model of fewer positions."""
    device = device_of(model)
    prompt = min(PREFILL_TOKENS, longest_input(model) - DECODE_TOKENS)
    ids = torch.randint(vocabulary, (1, prompt + DECODE_TOKENS), generator=torch.Generator().manual_seed(0)).to(device)

    def prefill():
        return model(input_ids=ids[:, :prompt], use_cache=True)

    prefills = [seconds(prefill, device) for _ in range(3)]
    cache = cache_of(prefill())
    steps = []
    for position in range(prompt, ids.shape[1]):
        token = ids[:, position : position + 1]
        steps.append(seconds(lambda token=token: model(input_ids=token, use_cache=True, **cache), device))
    return Speed(statistics.median(steps[2:]), statistics.median(prefills[1:]))


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call of `work`, which runs on `device`."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def memory(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared storage counted once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@torch.no_grad()
def faster_up_to(projections: list[Projection], rounds: int = 9) -> tuple[int, float]:
    """Up to which batch hasten's dense product beats torch's on projections of one shape, and the ratio at batch 1.

    Pairs are timed one after the other on different weights of the shape in turn, so that they are as cold as in decode; who comes first alternates.
    """
    weights = [(projection.module.weight, projection.module.bias) for projection in projections]
    weight, half = weights[0][0], len(weights) // 2
    best, ratio_at_one = 0, math.nan
    for batch in (1, 2, 4, MAX_BATCH):
        x = torch.randn(batch, 1, weight.shape[1], dtype=weight.dtype, device=weight.device)
        ratios = []
        for i in range(rounds + 2):
            theirs, ours = weights[i % len(weights)], weights[(i + half) % len(weights)]
            products = [partial(F.linear, x, *theirs), partial(linear, x, *ours)]
            turn = i % 2  # a weight that is alone of its shape is warm for the second
            times = {k: seconds(products[k], weight.device) for k in (turn, 1 - turn)}
            ratios.append(times[0] / times[1])
        ratio = statistics.median(ratios[2:])
        if batch == 1:
            ratio_at_one = ratio
        if ratio < 1:
            break
        best = batch
    return best, ratio_at_one
