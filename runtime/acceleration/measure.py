"""Measured speed and measured drift of a model, in decode as users run it: a prefill,
then one token after the other."""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from hasten.acceleration.edits import Edit
from hasten.acceleration.forwards import Forward
from hasten.acceleration.inference import Inference, Inputs
from hasten.acceleration.techniques.base import Regime
from hasten.acceleration.undisturbed import undisturbed
from hasten.kernels.storage import MAX_BATCH
from hasten.model_facts import device_of, longest_input, progress, synchronize

DRIFT_PREFIX, DRIFT_TOKENS = 16, 256
FEWEST_TARGETS = 4  # tokens to predict, of windows so long that a prefill of half of them leaves as many
FEWEST, MOST = 4, 24  # repetitions of what is timed
PRECISION = 0.05


@dataclass(frozen=True, slots=True)
class Timing:
    """Median seconds of one regime, before and after a technique."""

    regime: Regime
    before: float
    after: float

    @property
    def ratio(self) -> float:
        """How many times as fast it is."""
        return self.before / self.after


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


def heldout_logits(
    inference: Inference, pieces: list[Inputs], tokens: int = DRIFT_TOKENS
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For windows of held-out text: (ids that come next [T - prefix], the model's decode logits for them
    [T - prefix, V]), up to `tokens` in all. Left out are windows of which a prefill, that no picture may be cut by,
    leaves fewer than FEWEST_TARGETS."""
    results, done = [], 0
    for piece in progress(pieces, "measuring drift", unit="window"):
        if done >= tokens:
            break
        ids = inference.token_ids(piece)[0]
        prefix = max(min(DRIFT_PREFIX, ids.numel() // 2), inference.shortest_prefix(piece))
        if ids.numel() - prefix < max(1, min(FEWEST_TARGETS, ids.numel() // 2)):
            continue
        ids = ids[: prefix + tokens - done]
        logits = inference.decode(inference.cut(piece, ids.numel() - 1), prefix)[0]
        results.append((ids[prefix:].cpu(), logits))
        done += ids.numel() - prefix
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


@dataclass(slots=True)
class Activity:
    """Inputs that were multiplied, of all those that could have been."""

    active: int = 0
    total: int = 0

    @property
    def share(self) -> float | None:
        """The active share, None where nothing could be skipped."""
        return self.active / self.total if self.total else None


@contextlib.contextmanager
def counted(edits: Iterable[Edit]):
    """While open, counts the active inputs in every call of what `edits` installed. Gives the `Activity`."""
    activity = Activity()

    def add(found: tuple[int, int]) -> None:
        activity.active += found[0]
        activity.total += found[1]

    with contextlib.ExitStack() as stack:
        for edit in edits:
            stack.enter_context(edit.count(add))
        yield activity


def possible(inference: Inference, regime: Regime) -> Regime:
    """The regime that is run where this one is asked for: shortened to the model's positions, and with as many tokens
    as a prompt with a picture has."""
    longest = longest_input(inference.model)
    spare = MOST + 1 if regime.tokens == 1 else 0
    context = max(min(regime.context, longest - regime.tokens - spare), 1 if regime.context else 0)
    context = inference.prompt_length(context) if context else 0
    tokens = max(1, min(regime.tokens, longest - context))
    tokens = tokens if context else inference.prompt_length(tokens)
    return Regime(regime.batch, tokens, context, inference.image_length(context or tokens, regime.image))


def times(inference: Inference, regimes: Iterable[Regime]) -> dict[Regime, float]:
    """Median seconds of every `possible` regime, on tokens from a seed or the example, after a warm-up."""
    found = {}
    for regime in progress(list(regimes), "measuring speed", unit="regime"):
        with undisturbed(inference.model):
            found[regime] = _seconds_of(inference, regime)
    return found


def _seconds_of(inference: Inference, regime: Regime) -> float:
    tokens, context, longest = regime.tokens, regime.context, longest_input(inference.model)
    device, reading = device_of(inference.model), None
    prompt = inference.prompt(context or tokens, regime.batch, regime.image)
    if not context:
        return settled(lambda: seconds(lambda: inference.prefill(prompt, last=True), device), most=5)

    def step() -> float:
        nonlocal reading
        if reading is None or reading.ids.shape[1] + tokens > longest:
            _, reading = inference.prefill(prompt, last=True)
        ids = inference.random_ids(tokens, len(reading.ids), seed=1)
        return seconds(lambda: inference.step(reading, ids), device)

    return settled(step, MOST if tokens == 1 else 1)


def settled(once: Callable[[], float], most: int) -> float:
    """The median of as few measurements, after one for warming up, as give it to within PRECISION;
    of `most` at the most."""
    once()
    found: list[float] = []
    while len(found) < most:
        found.append(once())
        if len(found) >= min(FEWEST, most):
            middle = statistics.median(found)
            spread = statistics.median(abs(value - middle) for value in found)
            if 2 * 1.48 * spread / math.sqrt(len(found)) < PRECISION * middle:
                break
    return statistics.median(found)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call of `work`, which runs on `device`."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def memory(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, and of what hasten holds beside them; shared storage counted once."""
    forwards = [vars(module).get("forward") for module in model.modules()]
    held = [tensor for forward in forwards if isinstance(forward, Forward) for tensor in forward.tensors()]
    storages = {}
    for tensor in (*model.parameters(), *model.buffers(), *held):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@torch.no_grad()
def faster_up_to(
    contest: Callable[[int, int], tuple[Callable, Callable]], device: torch.device, rounds: int = 9
) -> tuple[int, float]:
    """Up to which batch our product beats torch's, and the ratio at batch 1.

    Args:
        contest: for a batch and a turn, torch's product and ours; other weights in every turn, so that they are as cold
            as in decode. Who comes first alternates.
    """
    best, ratio_at_one = 0, math.nan
    for batch in (1, 2, 4, MAX_BATCH):
        ratios = []
        for turn in range(rounds + 2):
            sides = contest(batch, turn)
            first = turn % 2  # a weight that is alone of its shape is warm for the second
            taken = {side: seconds(sides[side], device) for side in (first, 1 - first)}
            ratios.append(taken[0] / taken[1])
        ratio = statistics.median(ratios[2:])
        if batch == 1:
            ratio_at_one = ratio
        if ratio < 1:
            break
        best = batch
    return best, ratio_at_one
