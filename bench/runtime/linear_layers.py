"""Linear-attention layers of realistic size: transformers' torch fallbacks against hasten, in turn, in one run.

Each case is measured twice: the recurrence alone (the function that the layer calls, or for MiniMax the layer without
projections, activation and norm), and the whole layer with its projections, which both sides share.
"""

import argparse
import contextlib
import copy
import json
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers as tf
from torch import nn
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.minimax import modeling_minimax
from transformers.models.qwen3_next import modeling_qwen3_next

from hasten.acceleration.techniques.delta_rule_adapters import chunk_delta_rule, step_delta_rule
from hasten.acceleration.techniques.linear_attention_layers import LAYERS
from hasten.acceleration.techniques.mamba2_adapters import chunk_mamba2, step_mamba2
from hasten.kernels.recurrence.linear_attention import linear_attention_step
from hasten.model_facts import progress

logger = logging.getLogger("hasten.bench")

PREFILL, CONTINUATION = 4096, 2048
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Comparison:
    """`make()` gives the two sides, transformers' first, each a call that may be repeated."""

    name: str
    make: Callable[[], tuple[Callable[[], object], Callable[[], object]]]
    rounds: int = 5


def layer_of(layer: nn.Module) -> nn.Module:
    """A random layer in bfloat16, with decays as trained models have them."""
    layer = layer.to(DTYPE).eval().requires_grad_(False)
    for name, parameter in layer.named_parameters():
        if name.endswith("A_log"):
            parameter.copy_(torch.rand_like(parameter) * 2)
        elif name.endswith("dt_bias"):
            parameter.copy_(torch.rand_like(parameter) * 3 - 5)
        elif parameter.dim() >= 2:
            parameter.normal_(std=0.02)
    return layer


def fast(layer: nn.Module) -> Callable:
    forward = LAYERS[type(layer).__name__].make(layer)
    return lambda *arguments, **keywords: forward(layer, *arguments, **keywords)


def qwen3_next() -> nn.Module:
    """Qwen3-Next-80B-A3B: hidden 2048, 16 heads of q and k, 32 of v, of 128."""
    config = tf.Qwen3NextConfig(num_hidden_layers=1, layer_types=["linear_attention"])
    return layer_of(modeling_qwen3_next.Qwen3NextGatedDeltaNet(config, 0))


def kimi_linear() -> nn.Module:
    """A quarter of a layer of Kimi-Linear-48B-A3B (hidden 2304): 8 of its 32 heads of 128, for all of them transformers
    needs 17 GB per temporary at 4096 tokens."""
    config = tf.KimiLinearConfig(num_hidden_layers=1, layer_types=["linear_attention"], linear_num_heads=8)
    return layer_of(modeling_kimi_linear.KimiLinearDeltaAttention(config, 0))


def mamba2() -> nn.Module:
    """Mamba-2 2.7B: hidden 2560, 80 heads of 64, state 128, one group."""
    config = tf.Mamba2Config(
        hidden_size=2560, num_heads=80, head_dim=64, state_size=128, n_groups=1, num_hidden_layers=1
    )
    return layer_of(modeling_mamba2.Mamba2Mixer(config, 0))


def minimax() -> nn.Module:
    """MiniMax-Text-01: hidden 6144, 64 heads of 128, in the middle of 80 layers."""
    config = tf.MiniMaxConfig(
        hidden_size=6144,
        num_attention_heads=64,
        head_dim=128,
        num_hidden_layers=80,
        layer_types=["linear_attention"] * 80,
    )
    return layer_of(modeling_minimax.MiniMaxLightningAttention(config, 40))


class _Passed(nn.Module):
    """In the place of a projection: gives what was computed before, so that what is left is the recurrence."""

    def __init__(self, output: torch.Tensor):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output[:, : x.shape[1]]


def without_projections(layer: nn.Module, x: torch.Tensor) -> nn.Module:
    """A MiniMax layer whose projections, activation and norm cost nothing."""
    bare = copy.copy(layer)
    bare._modules = dict(layer._modules)
    bare.qkv_proj, bare.output_gate = _Passed(layer.act_fn(layer.qkv_proj(x))), _Passed(layer.output_gate(x))
    bare.act_fn = bare.norm = bare.out_proj = nn.Identity()
    return bare


def _hidden(layer_size: int, tokens: int) -> torch.Tensor:
    return torch.randn(1, tokens, layer_size, dtype=DTYPE)


def _delta_inputs(T: int, H: int, Hv: int, kind: str) -> tuple:
    q, k = torch.randn(2, 1, T, H, 128, dtype=DTYPE)
    decay = -torch.rand((1, T, Hv) if kind == "scalar" else (1, T, Hv, 128))
    return q, k, torch.randn(1, T, Hv, 128, dtype=DTYPE), decay, torch.rand(1, T, Hv, dtype=DTYPE)


def delta_prefill(kind: str) -> tuple:
    if kind == "scalar":
        stock, arguments = modeling_qwen3_next.torch_chunk_gated_delta_rule, _delta_inputs(PREFILL, 16, 32, kind)
    else:
        stock, arguments = modeling_kimi_linear.chunk_kimi_delta_attention, _delta_inputs(PREFILL, 8, 8, kind)
    settings = {"use_qk_l2norm_in_kernel": True, "output_final_state": True}
    return lambda: stock(*arguments, **settings), lambda: chunk_delta_rule(*arguments, **settings)


def delta_step() -> tuple:
    arguments = _delta_inputs(1, 16, 32, "scalar")
    states = [torch.randn(1, 32, 128, 128) for _ in range(300)]  # cold, as between the layers of a model
    settings = {"use_qk_l2norm_in_kernel": True, "output_final_state": True}
    stock = modeling_qwen3_next.torch_recurrent_gated_delta_rule

    def call(function):
        states.append(states.pop(0))
        return states[-1].copy_(function(*arguments, initial_state=states[-1], **settings)[1])  # as the cache does

    return lambda: call(stock), lambda: call(step_delta_rule)


def _mamba_inputs(T: int) -> tuple:
    x, dt = torch.randn(1, T, 80, 64, dtype=DTYPE), torch.randn(1, T, 80, dtype=DTYPE) - 3
    B, C = torch.randn(2, 1, T, 1, 128, dtype=DTYPE)
    return x, dt, -torch.rand(80) * 4, B, C


def mamba2_prefill() -> tuple:
    arguments = (*_mamba_inputs(PREFILL), 256)
    settings = {"D": torch.ones(80), "dt_bias": torch.zeros(80), "dt_softplus": True, "return_final_states": True}
    stock = modeling_mamba2.mamba2_chunk_scan
    return lambda: stock(*arguments, **settings), lambda: chunk_mamba2(*arguments, **settings)


def mamba2_step() -> tuple:
    x, dt, A, B, C = _mamba_inputs(1)
    x, dt, B, C = x[:, 0], dt.transpose(1, 2).expand(-1, -1, 64), B[:, 0], C[:, 0]
    A, D, bias = (
        A[:, None, None].expand(-1, 64, 128),
        torch.ones(80)[:, None].expand(-1, 64),
        torch.zeros(80)[:, None].expand(-1, 64),
    )
    states = [torch.randn(1, 80, 128, 64).transpose(2, 3) for _ in range(240)]

    def call(function):
        states.append(states.pop(0))
        return function(states[-1], x, dt, A, B, C, D, dt_bias=bias, dt_softplus=True)

    return lambda: call(modeling_mamba2.mamba2_selective_state_update), lambda: call(step_mamba2)


def layer_prefill(make: Callable[[], nn.Module], tokens: int = PREFILL) -> tuple:
    layer = make()
    x = _hidden(next(p.shape[1] for p in layer.parameters() if p.dim() == 2), tokens)
    mine = fast(layer)
    return lambda: layer(x), lambda: mine(x)


def minimax_prefill(bare: bool) -> tuple:
    layer, x = minimax(), _hidden(6144, PREFILL)
    layer = without_projections(layer, x) if bare else layer
    mine = fast(layer)
    return lambda: layer(x, None, None), lambda: mine(x, None, None)


def minimax_continuation() -> tuple:
    """The recurrence of CONTINUATION tokens after a cached prefix."""
    x = _hidden(6144, CONTINUATION)
    layer = without_projections(minimax(), x)
    state = torch.randn(1, 64, 128, 128)  # neither side writes to it; transformers keeps it in the model's dtype
    states = {DTYPE: state.to(DTYPE), torch.float32: state}

    def call(function, dtype):
        cache = modeling_minimax.MiniMaxCache()
        cache.set_linear_cache(layer.layer_idx, states[dtype])
        cache.linear_cache[: layer.layer_idx] = [[]] * layer.layer_idx
        return function(x, None, None, cache)

    mine = fast(layer)
    return lambda: call(layer, DTYPE), lambda: call(mine, torch.float32)


def minimax_step(position: int) -> tuple:
    """The recurrence of one token after `position` others, whose state the side's own prefill left in the cache."""
    x = _hidden(6144, 1)
    layer = without_projections(minimax(), _hidden(6144, position))
    sides = []
    for function in (layer, fast(layer)):
        cache = modeling_minimax.MiniMaxCache()
        function(_hidden(6144, position), None, None, cache)
        sides.append(partial(function, x, None, None, cache))
    return tuple(sides)


COMPARISONS = [
    Comparison("recurrence: gated delta rule, prefill 4096", lambda: delta_prefill("scalar")),
    Comparison("layer: Qwen3-Next, prefill 4096", lambda: layer_prefill(qwen3_next)),
    Comparison("recurrence: gated delta rule, decode step", delta_step, 200),
    Comparison("recurrence: Kimi delta attention, 8 heads, prefill 4096", lambda: delta_prefill("vector"), 3),
    Comparison("layer: Kimi-Linear with 8 heads, prefill 4096", lambda: layer_prefill(kimi_linear), 3),
    Comparison("recurrence: Mamba-2, prefill 4096", mamba2_prefill),
    Comparison("layer: Mamba-2 2.7B, prefill 4096", lambda: layer_prefill(mamba2)),
    Comparison("recurrence: Mamba-2, decode step", mamba2_step, 200),
    Comparison("recurrence: MiniMax, prefill 4096", lambda: minimax_prefill(bare=True)),
    Comparison("layer: MiniMax, prefill 4096", lambda: minimax_prefill(bare=False), 3),
    Comparison("recurrence: MiniMax, continuation 2048", minimax_continuation, 3),
    Comparison("recurrence: MiniMax, decode step after 64", lambda: minimax_step(64), 200),
    Comparison("recurrence: MiniMax, decode step after 16384", lambda: minimax_step(16384), 200),
]


@torch.no_grad()
def compare(comparison: Comparison) -> dict:
    """Medians of calls in turn, and the memory that one call of each side takes beyond what is held before it."""
    torch.manual_seed(0)
    stock, mine = comparison.make()
    memory = [peak(stock), peak(mine)]
    times = []
    for _ in range(comparison.rounds):
        times.append([_seconds(stock), _seconds(mine)])
    theirs, ours = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "case": comparison.name,
        "seconds": ours,
        "baseline": "transformers",
        "baseline_seconds": theirs,
        "ratio": theirs / ours,
        "temporary_bytes": memory[1],
        "baseline_temporary_bytes": memory[0],
    }


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def peak(call: Callable[[], object]) -> int | None:
    """Bytes by which the memory of this process grows at most during a call that was made once before;
    None where Linux does not tell."""
    call()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


@torch.no_grad()
def minimax_drift(tokens: int = 4096) -> dict:
    """Relative error of the last outputs of a decode of `tokens` steps in bfloat16 against the same recurrence in
    float64, for transformers and hasten.

    The recurrence alone, on queries, keys and values as the layer makes them (silu of normal numbers, heads of 64), for
    a head that forgets slowly (the last layer, slope 6.7e-6) and one that forgets faster (slope 0.0039), with
    transformers' own loop and hasten's step.
    """
    result = {"tokens": tokens}
    for slope in (6.7e-6, 0.0039):
        torch.manual_seed(0)
        q, k, v = nn.functional.silu(torch.randn(3, 1, tokens, 1, 64)).to(DTYPE)
        decay = torch.tensor([-slope])
        exact = torch.zeros(1, 1, 64, 64, dtype=torch.float64)
        stock, mine = torch.zeros(1, 1, 64, 64, dtype=DTYPE), torch.zeros(1, 1, 64, 64)
        factor = decay.exp().to(DTYPE)
        errors = {"transformers": [], "hasten": []}
        for t in range(tokens):
            own = slice(t, t + 1)
            exact = exact * decay.double().exp() + k[:, t, :, :, None].double() * v[:, t, :, None].double()
            stock = factor * stock + k[:, t, :, :, None] @ v[:, t, :, None]  # as MiniMaxLightningAttention.forward does
            output = linear_attention_step(q[:, own], k[:, own], v[:, own], mine, decay=decay)[:, 0]
            if t >= tokens - 256:
                expected = (q[:, t, :, None].double() @ exact)[..., 0, :]
                theirs = (q[:, t, :, None] @ stock)[..., 0, :]
                for name, found in (("transformers", theirs), ("hasten", output)):
                    errors[name].append(float((found.double() - expected).norm() / expected.norm()))
        result[f"slope {slope}"] = {name: statistics.mean(values) for name, values in errors.items()}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("patterns", nargs="*", help="parts of the names of the cases to run; all if there is none")
    parser.add_argument("--json", type=Path, help="write the records there")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    chosen = [c for c in COMPARISONS if not arguments.patterns or any(p in c.name for p in arguments.patterns)]
    records = []
    with contextlib.suppress(KeyboardInterrupt):
        for comparison in progress(chosen, "layers", unit="case"):
            record = compare(comparison)
            records.append(record)
            memory = [record["baseline_temporary_bytes"], record["temporary_bytes"]]
            held = ", ".join("-" if size is None else f"{size / 1e6:.0f} MB" for size in memory)
            logger.info(
                "%s: %.2f -> %.2f ms, %.2fx; temporary memory %s",
                record["case"], record["baseline_seconds"] * 1e3, record["seconds"] * 1e3, record["ratio"], held,
            )  # fmt: skip
    drift = minimax_drift()
    logger.info("%s", json.dumps(drift))
    if arguments.json:
        results = {"threads": torch.get_num_threads(), "cases": records, "minimax bfloat16 decode": drift}
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
