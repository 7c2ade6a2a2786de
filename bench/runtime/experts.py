"""Experts of realistic layers in decode: transformers' implementations against hasten, in turn, in one run.

One layer each of the shape of Mixtral, Qwen3-MoE and gpt-oss with random weights in bfloat16. `hasten 50%` skips half
of the inputs of each expert as Wina does: |x_j| times the norm of column j at or below a median over calibration
inputs. Weights are cold: every call picks the experts that were picked longest ago, of 1.2 to 2.8 GB of them; which
rows of a batch share an expert is random. Before that every expert was read once: pages that lay idle for seconds are
slow to read in virtual machines whose hosts look for idle memory.
"""

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as tf
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from hasten.acceleration.experts import ExpertsLayout, decode_experts, expert_inputs, layout_of
from hasten.bench.runner import bandwidth
from hasten.kernels import backend, storage

logger = logging.getLogger("hasten.bench")

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")  # of transformers
DENSE, SPARSE = "hasten dense", "hasten 50%"
BATCHES = (1, 4)
CALIBRATION_TOKENS = 256
DTYPE = torch.bfloat16
# Each contender is tried FEWEST times; one that takes PATIENCE times as long as the fastest is measured no further.
PATIENCE, FEWEST = 3, 3
BANDWIDTHS = 5  # measured before and after


@dataclass(frozen=True)
class Shape:
    """One layer's experts, of which a token picks `picks`."""

    name: str
    make: Callable[[], nn.Module]
    picks: int


SHAPES = [
    Shape(
        "Mixtral-8x7B",
        lambda: MixtralExperts(tf.MixtralConfig(hidden_size=4096, intermediate_size=14336, num_local_experts=8)),
        2,
    ),
    Shape(
        "Qwen3-30B-A3B",
        lambda: Qwen3MoeExperts(tf.Qwen3MoeConfig(hidden_size=2048, moe_intermediate_size=768, num_experts=128)),
        8,
    ),
    Shape(
        "gpt-oss-20b",
        lambda: GptOssExperts(tf.GptOssConfig(hidden_size=2880, intermediate_size=2880, num_local_experts=32)),
        4,
    ),
]


def build(shape: Shape) -> nn.Module:
    """The experts with random weights: tiles of one block of random numbers, which takes seconds instead of minutes."""
    with torch.device("meta"):
        module = shape.make().to(DTYPE)
    module.to_empty(device="cpu").eval().requires_grad_(False)
    tile = torch.randn((1 << 22) + 3, generator=torch.Generator().manual_seed(0)) / module.config.hidden_size**0.5
    tile = tile.to(DTYPE)
    for i, parameter in enumerate(module.parameters()):
        shifted = tile.roll(7919 * i)
        for part in parameter.view(-1).split(tile.numel()):
            part.copy_(shifted[: part.numel()])
    return module


def by_columns(module: nn.Module, layout: ExpertsLayout) -> nn.Module:
    """The same experts stored column-major, on memory of their own unless they are so already."""
    copy = object.__new__(type(module))
    copy.__dict__ = module.__dict__ | {"_parameters": dict(module._parameters)}
    for weight in layout.weights:
        tensor = weight.parameter(module).detach()
        if weight.transposed:
            tensor = tensor.contiguous()
        elif not storage.is_column_major(tensor):
            tensor = storage.to_column_major(tensor)
        copy._parameters[weight.name] = nn.Parameter(tensor, requires_grad=False)
    return copy


def median_cutoffs(module: nn.Module, layout: ExpertsLayout) -> dict[str, torch.Tensor]:
    """Cutoffs [E, K] of each map that half of the calibration inputs of each expert are at or below,
    weighted as Wina."""
    x, index, _ = routing(layout, CALIBRATION_TOKENS * layout.experts // 8, 8)
    cutoffs = {}
    for weight in layout.weights:
        matrix = weight.of(module, layout.experts)
        norms = torch.stack([expert.float().norm(dim=0) for expert in matrix])  # [E, K]
        cutoffs[weight.name] = norms
    for e, inputs in expert_inputs(module, layout, x, index):
        for name, rows in inputs.items():
            norms = cutoffs[name][e].clone()
            scores = rows.abs().float() * norms
            cutoffs[name][e] = scores.flatten()[: 1 << 22].median() / norms
    return cutoffs


def routing(layout: ExpertsLayout, tokens: int, picks: int) -> tuple[torch.Tensor, ...]:
    """Hidden states, and experts and their weights drawn at random: what the module is called with."""
    x = torch.randn(tokens, layout.hidden).to(DTYPE)
    index = torch.rand(tokens, layout.experts).topk(picks).indices
    return x, index, torch.rand(tokens, picks).softmax(-1).to(DTYPE)


class Rotation:
    """Routings of `tokens` tokens that call for the experts in a cycle, so that each was picked longest ago."""

    def __init__(self, layout: ExpertsLayout, tokens: int, picks: int):
        self.layout, self.tokens, self.picks = layout, tokens, picks
        self.cycle, self.at = torch.randperm(layout.experts), 0

    def next(self) -> tuple[torch.Tensor, ...]:
        """Like `routing`; where rows share an expert is drawn at random, which expert it is comes from the cycle."""
        x, index, weights = routing(self.layout, self.tokens, self.picks)
        distinct, ranks = index.unique(return_inverse=True)
        index = self.cycle[(self.at + ranks) % self.layout.experts]
        self.at += len(distinct)
        return x, index, weights


def bytes_read(module, layout, arguments, cutoffs=None) -> int:
    """Bytes of weights that a call must read: the picked experts,
    of each the columns active in a row that picked it."""
    total = 0
    for e, inputs in expert_inputs(module, layout, *arguments[:2]):
        for weight in layout.weights:
            N, K = weight.of(module, layout.experts).shape[1:]
            rows = inputs[weight.name].float().abs()
            active = K if cutoffs is None else int((rows > cutoffs[weight.name][e]).any(0).sum())
            total += N * active * DTYPE.itemsize
    return total


def contenders(module: nn.Module) -> tuple[dict[str, Callable], dict[str, Callable]]:
    """By name, calls on the arguments of the module's forward, and functions that give the bytes they must read."""
    layout = layout_of(module)
    columns = by_columns(module, layout)
    cutoffs = median_cutoffs(module, layout)

    def stock(name):
        def call(*arguments):
            module.config._experts_implementation = name
            return module(*arguments)

        return call

    return {name: stock(name) for name in IMPLEMENTATIONS} | {
        DENSE: lambda *arguments: decode_experts(module, layout, *arguments),
        SPARSE: lambda *arguments: decode_experts(columns, layout, *arguments, cutoffs=cutoffs),
    }, {
        DENSE: lambda *arguments: bytes_read(module, layout, arguments),
        SPARSE: lambda *arguments: bytes_read(module, layout, arguments, cutoffs),
    }


@torch.no_grad()
def compare(shape: Shape, rounds: int) -> list[dict]:
    """Records as those of `hasten.bench.runner`, of our two contenders against transformers' fastest
    and against our dense one."""
    torch.manual_seed(0)
    module = build(shape)
    layout = layout_of(module)
    calls, moved = contenders(module)
    records = []
    for tokens in BATCHES:
        stored = {name: Rotation(layout, tokens, shape.picks) for name in moved}  # by rows, and by columns
        rotations = {name: stored.get(name, stored[DENSE]) for name in calls}
        rates = [bandwidth("cpu", turn) for turn in range(BANDWIDTHS)]
        read = {
            name: statistics.mean(count(*stored[name].next()) for _ in range(FEWEST)) for name, count in moved.items()
        }
        seconds = in_turn(calls, rotations, FEWEST)
        quick = {name: call for name, call in calls.items() if seconds[name] <= PATIENCE * min(seconds.values())}
        for name, rotation in stored.items():
            rotation.at = 0
            while rotation.at < layout.experts:
                calls[name](*rotation.next())
        seconds |= in_turn(quick, rotations, rounds)
        rates += [bandwidth("cpu", turn) for turn in range(BANDWIDTHS)]
        logger.info(
            "%s batch %d: %s", shape.name, tokens, ", ".join(f"{n} {s * 1e3:.2f} ms" for n, s in seconds.items())
        )
        records += records_of(f"{shape.name} batch {tokens}", seconds, read, statistics.median(rates))
    return records


def in_turn(calls: dict[str, Callable], rotations: dict[str, Rotation], rounds: int) -> dict[str, float]:
    """The median seconds of each call, taken in turn."""
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            arguments = rotations[name].next()
            begin = time.perf_counter()
            call(*arguments)
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(own) for name, own in times.items()}


def records_of(case: str, seconds: dict[str, float], read: dict[str, float], rate: float) -> list[dict]:
    fastest = min(IMPLEMENTATIONS, key=seconds.get)
    pairs = [(DENSE, fastest), (SPARSE, fastest), (SPARSE, DENSE)]
    return [
        {
            "op": "experts",
            "case": f"{case} {name.removeprefix('hasten ')}",
            "dtype": str(DTYPE).removeprefix("torch."),
            "device": "cpu",
            "backend": backend.choose(torch.empty(0, dtype=DTYPE)),
            "baseline": f"transformers {baseline}" if baseline == fastest else baseline,
            "seconds": seconds[name],
            "baseline_seconds": seconds[baseline],
            "ratio": seconds[baseline] / seconds[name],
            "share_of_limit": read[name] / rate / seconds[name],
            "bytes": read[name],
            "bandwidth": rate,
            "transformers_seconds": {implementation: seconds[implementation] for implementation in IMPLEMENTATIONS},
        }
        for name, baseline in pairs
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("patterns", nargs="*", help="parts of the names of the shapes to run; all if there is none")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the records there")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    records = []
    for shape in SHAPES:
        if not arguments.patterns or any(pattern.lower() in shape.name.lower() for pattern in arguments.patterns):
            records += compare(shape, arguments.rounds)
    for record in records:
        print(
            f"{record['case']:28} against {record['baseline']:24} {record['seconds'] * 1e3:8.2f} ms  "
            f"{record['ratio']:5.2f}x  {record['share_of_limit']:4.0%} of the bandwidth"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
