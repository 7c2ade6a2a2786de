"""Linear-attention layers of realistic size: transformers' torch fallbacks against hasten, in turn, in one run.

Most cases are measured twice: the recurrence alone (the function that the layer calls, on what the layer gives it; for
MiniMax the layer without projections, activation and norm), and the whole layer with its projections, which both sides
share. Layers are as their models initialise them, decays and time steps too.
"""

import argparse
import contextlib
import copy
import inspect
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers as tf
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.falcon_mamba import modeling_falcon_mamba
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.lfm2 import modeling_lfm2
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.minimax import modeling_minimax
from transformers.models.qwen3_next import modeling_qwen3_next
from transformers.models.qwen4_exp import modeling_qwen4_exp
from transformers.models.xlstm import modeling_xlstm

from hasten.acceleration.techniques.adapted_forwards import remade
from hasten.acceleration.techniques.linear_attention_layers import LAYERS
from hasten.acceleration.techniques.minimax_adapters import LightningEntry
from hasten.kernels import cpu
from hasten.kernels.recurrence.linear_attention import linear_attention_step
from hasten.model_facts import progress

logger = logging.getLogger("hasten.bench")

PREFILL = 4096
SCANNED = 512  # tokens of a selective scan, for which transformers needs milliseconds each
COLD = 1 << 28  # bytes of states of each side, more than the last cache holds
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Comparison:
    """`make()` gives the two sides, transformers' first, each a call that may be repeated."""

    name: str
    make: Callable[[], tuple[Callable[[], object], Callable[[], object]]]
    rounds: int = 5


def initialised(layer: nn.Module, family: type[PreTrainedModel], config: PretrainedConfig, dtype=DTYPE) -> nn.Module:
    """A layer as `family` initialises those of its models: projections, decays and time steps."""
    model = family.__new__(family)
    nn.Module.__init__(model)
    model.config, model.mlstm_layer = config, layer  # xLSTM's rules look at names
    for module in layer.modules():
        model._init_weights(module)
    return layer.to(dtype).eval()


def fast(layer: nn.Module) -> Callable:
    forward = LAYERS[type(layer).__name__].make(layer)
    return lambda *arguments, **keywords: forward(layer, *arguments, **keywords)


def qwen3_next() -> nn.Module:
    """Qwen3-Next-80B-A3B: hidden 2048, 16 heads of q and k, 32 of v, of 128."""
    config = tf.Qwen3NextConfig(num_hidden_layers=1, layer_types=["linear_attention"])
    layer = modeling_qwen3_next.Qwen3NextGatedDeltaNet(config, 0)
    return initialised(layer, modeling_qwen3_next.Qwen3NextPreTrainedModel, config)


def qwen4_exp() -> nn.Module:
    """Qwen4-exp by its default configuration: hidden 2048, 16 heads of q and k, 32 of v, of 128."""
    config = tf.Qwen4ExpTextConfig(num_hidden_layers=1, layer_types=["linear_attention"])
    layer = modeling_qwen4_exp.Qwen4ExpTextGatedDeltaNet(config, 0)
    return initialised(layer, modeling_qwen4_exp.Qwen4ExpPreTrainedModel, config)


def kimi_linear() -> nn.Module:
    """A quarter of a layer of Kimi-Linear-48B-A3B (hidden 2304): 8 of its 32 heads of 128, for all of them transformers
    needs 17 GB per temporary at 4096 tokens."""
    config = tf.KimiLinearConfig(num_hidden_layers=1, layer_types=["linear_attention"], linear_num_heads=8)
    layer = modeling_kimi_linear.KimiLinearDeltaAttention(config, 0)
    return initialised(layer, modeling_kimi_linear.KimiLinearPreTrainedModel, config)


def mamba2() -> nn.Module:
    """Mamba-2 2.7B: hidden 2560, 80 heads of 64, state 128, one group."""
    config = tf.Mamba2Config(
        hidden_size=2560, num_heads=80, head_dim=64, state_size=128, n_groups=1, num_hidden_layers=1
    )
    layer = modeling_mamba2.Mamba2Mixer(config, 0)
    return initialised(layer, modeling_mamba2.Mamba2PreTrainedModel, config)


def mamba() -> nn.Module:
    """Mamba 2.8B: hidden 2560, 5120 channels, state 16."""
    config = tf.MambaConfig(hidden_size=2560, num_hidden_layers=1)
    return initialised(modeling_mamba.MambaMixer(config, 0), modeling_mamba.MambaPreTrainedModel, config)


def falcon_mamba() -> nn.Module:
    """Falcon-Mamba 7B: hidden 4096, 8192 channels, state 16, with norms of its time steps, B and C."""
    config = tf.FalconMambaConfig(hidden_size=4096, num_hidden_layers=1)
    layer = modeling_falcon_mamba.FalconMambaMixer(config, 0, initialize_mixer_weights=False)
    return initialised(layer, modeling_falcon_mamba.FalconMambaPreTrainedModel, config)


def lfm2() -> nn.Module:
    """LFM2 1.2B: hidden 2048, a convolution over 3 tokens."""
    config = tf.Lfm2Config(hidden_size=2048, num_hidden_layers=1, layer_types=["conv"])
    return initialised(modeling_lfm2.Lfm2ShortConv(config, 0), modeling_lfm2.Lfm2PreTrainedModel, config)


def xlstm() -> nn.Module:
    """xLSTM 7B: hidden 4096, 8 heads, states of 256 by 512; in float32, for transformers' cell raises in bfloat16."""
    config = tf.xLSTMConfig()
    layer = modeling_xlstm.xLSTMLayer(config)
    return initialised(layer, modeling_xlstm.xLSTMPreTrainedModel, config, torch.float32)


def minimax() -> nn.Module:
    """MiniMax-Text-01: hidden 6144, 64 heads of 128, in the middle of 80 layers."""
    config = tf.MiniMaxConfig(
        hidden_size=6144,
        num_attention_heads=64,
        head_dim=128,
        num_hidden_layers=80,
        layer_types=["linear_attention"] * 80,
    )
    layer = modeling_minimax.MiniMaxLightningAttention(config, 40)
    return initialised(layer, modeling_minimax.MiniMaxPreTrainedModel, config)


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


def _hidden(layer: nn.Module, tokens: int) -> torch.Tensor:
    """Inputs of a layer, with the scale that a norm leaves them."""
    projection = layer.o_proj if hasattr(layer, "o_proj") else layer.out_proj
    return torch.randn(1, tokens, projection.out_features, dtype=projection.weight.dtype)


def call_of(layer: nn.Module, function: str, x: torch.Tensor, *cache) -> tuple[tuple, dict]:
    """The arguments with which the layer calls a function of its module."""
    calls = []
    stock = getattr(sys.modules[type(layer).__module__], function)

    def listen(*arguments, **keywords):
        calls.append((arguments, keywords))
        return stock(*arguments, **keywords)

    remade(**{function: listen})(layer)(layer, x, *cache)
    return calls[-1]


def recurrence(make: Callable[[], nn.Module], function: str, tokens: int = PREFILL) -> tuple:
    """The function alone, on what the layer gives it."""
    layer = make()
    arguments, keywords = call_of(layer, function, _hidden(layer, tokens))
    stock = getattr(sys.modules[type(layer).__module__], function)
    return (
        lambda: stock(*arguments, **keywords),
        partial(LAYERS[type(layer).__name__].replaced[function], *arguments, **keywords),
    )


def step(make: Callable[[], nn.Module], function: str, state: str) -> tuple:
    """The function of a decode step alone, after a prefill. Its states are cold, as between the layers of a model."""
    layer = make()
    cache = tf.DynamicCache(config=layer.config if hasattr(layer, "config") else _one_layer())
    layer(_hidden(layer, 64), cache)
    arguments, keywords = call_of(layer, function, _hidden(layer, 1), cache)
    stock = getattr(sys.modules[type(layer).__module__], function)
    words = dict(zip(inspect.signature(stock).parameters, arguments, strict=False)) | keywords
    held = words.pop(state)
    sides = []
    for side in (stock, LAYERS[type(layer).__name__].replaced[function]):
        states = [held.clone() for _ in range(max(2, COLD // (held.numel() * held.element_size())))]
        sides.append(partial(_stepped, side, words, state, states))
    return tuple(sides)


def _stepped(function: Callable, words: dict, name: str, states: list[torch.Tensor]) -> object:
    """A call with the state that was used the longest ago, left as a layer's cache leaves it."""
    states.append(states.pop(0))
    result = function(**words, **{name: states[-1]})
    if isinstance(result, tuple):
        states[-1].copy_(result[1])
        return result[0]
    return result


def _one_layer() -> PretrainedConfig:
    return tf.Qwen3NextConfig(num_hidden_layers=1, layer_types=["linear_attention"])


def layer_prefill(make: Callable[[], nn.Module], tokens: int = PREFILL) -> tuple:
    layer = make()
    x, mine = _hidden(layer, tokens), fast(layer)
    return lambda: layer(x), lambda: mine(x)


def layer_step(make: Callable[[], nn.Module]) -> tuple:
    """A decode step of a whole layer, with a cache of its own for each side."""
    layer = make()
    prompt, x = _hidden(layer, 64), _hidden(layer, 1)
    sides = []
    for side in (layer, fast(layer)):
        cache = tf.DynamicCache(config=layer.config)
        side(prompt, cache)
        sides.append(partial(side, x, cache))
    return tuple(sides)


def xlstm_cell(tokens: int) -> tuple:
    """The cell alone, on what its layer gives it: a prefill, or one token after 64."""
    layer = xlstm()
    calls = []
    backend = layer.mlstm_backend
    hook = backend.register_forward_pre_hook(lambda module, _, words: calls.append(words), with_kwargs=True)
    _, state = layer(_hidden(layer, 64))
    layer(_hidden(layer, tokens), state if tokens == 1 else None)
    hook.remove()
    return partial(backend, **calls[-1]), partial(fast(backend), **calls[-1])


def minimax_prefill(bare: bool) -> tuple:
    layer = minimax()
    x = _hidden(layer, PREFILL)
    layer = without_projections(layer, x) if bare else layer
    mine = fast(layer)
    return lambda: layer(x, None, None)[0], lambda: mine(x, None, None)[0]


def _minimax_cache(layer: nn.Module) -> modeling_minimax.MiniMaxCache:
    """A cache as a model has it that hasten accelerated: with entries for the layers before this one."""
    cache = modeling_minimax.MiniMaxCache()
    cache.layers = [LightningEntry(cache.linear_cache, i) for i in range(layer.layer_idx)]
    return cache


def minimax_step(position: int) -> tuple:
    """The recurrence of one token after `position` others, whose state the side's own prefill left in the cache."""
    layer = minimax()
    x, prompt = _hidden(layer, 1), _hidden(layer, position)
    layer = without_projections(layer, prompt)
    sides = []
    for function in (layer, fast(layer)):
        cache = _minimax_cache(layer)
        function(prompt, None, None, cache)
        sides.append(partial(function, x, None, None, cache))
    return tuple(sides)


CHUNK_DELTA, STEP_DELTA = "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"
SCAN, STEP_SCAN = "mamba_selective_scan", "mamba_selective_state_update"
COMPARISONS = [
    Comparison("recurrence: Qwen3-Next, prefill 4096", lambda: recurrence(qwen3_next, CHUNK_DELTA)),
    Comparison("layer: Qwen3-Next, prefill 4096", lambda: layer_prefill(qwen3_next)),
    Comparison("recurrence: Qwen3-Next, decode step", lambda: step(qwen3_next, STEP_DELTA, "initial_state"), 200),
    Comparison("recurrence: Qwen4-exp, prefill 4096", lambda: recurrence(qwen4_exp, CHUNK_DELTA)),
    Comparison("layer: Qwen4-exp, prefill 4096", lambda: layer_prefill(qwen4_exp)),
    Comparison(
        "recurrence: Kimi-Linear with 8 heads, prefill 4096",
        lambda: recurrence(kimi_linear, "chunk_kimi_delta_attention"),
        3,
    ),
    Comparison("layer: Kimi-Linear with 8 heads, prefill 4096", lambda: layer_prefill(kimi_linear), 3),
    Comparison("recurrence: Mamba-2 2.7B, prefill 4096", lambda: recurrence(mamba2, "mamba2_chunk_scan")),
    Comparison("layer: Mamba-2 2.7B, prefill 4096", lambda: layer_prefill(mamba2)),
    Comparison(
        "recurrence: Mamba-2 2.7B, decode step", lambda: step(mamba2, "mamba2_selective_state_update", "state"), 200
    ),
    Comparison("recurrence: Mamba 2.8B, prefill 512", lambda: recurrence(mamba, SCAN, SCANNED), 3),
    Comparison("layer: Mamba 2.8B, prefill 512", lambda: layer_prefill(mamba, SCANNED), 3),
    Comparison("recurrence: Mamba 2.8B, decode step", lambda: step(mamba, STEP_SCAN, "state"), 200),
    Comparison("layer: Mamba 2.8B, decode step", lambda: layer_step(mamba), 50),
    Comparison("recurrence: Falcon-Mamba 7B, prefill 512", lambda: recurrence(falcon_mamba, SCAN, SCANNED), 3),
    Comparison("layer: Falcon-Mamba 7B, prefill 512", lambda: layer_prefill(falcon_mamba, SCANNED), 3),
    Comparison("recurrence: Falcon-Mamba 7B, decode step", lambda: step(falcon_mamba, STEP_SCAN, "state"), 200),
    Comparison("convolution: LFM2 1.2B, prefill 4096", lambda: recurrence(lfm2, "causal_conv1d_fn")),
    Comparison("layer: LFM2 1.2B, prefill 4096", lambda: layer_prefill(lfm2)),
    Comparison("convolution: LFM2 1.2B, decode step", lambda: step(lfm2, "causal_conv1d_update", "conv_state"), 200),
    Comparison("recurrence: xLSTM 7B, float32, prefill 128", lambda: xlstm_cell(128), 3),
    Comparison("recurrence: xLSTM 7B, float32, decode step", lambda: xlstm_cell(1), 100),
    Comparison("recurrence: MiniMax, prefill 4096", lambda: minimax_prefill(bare=True)),
    Comparison("layer: MiniMax, prefill 4096", lambda: minimax_prefill(bare=False), 3),
    Comparison("recurrence: MiniMax, decode step after 64", lambda: minimax_step(64), 200),
    Comparison("recurrence: MiniMax, decode step after 16384", lambda: minimax_step(16384), 200),
]


@torch.no_grad()
def compare(comparison: Comparison) -> dict:
    """Medians of calls in turn, the relative distance of the two sides' outputs, and the memory that one call of each
    side takes beyond what is held before it."""
    torch.manual_seed(0)
    stock, mine = comparison.make()
    outputs = [_output(stock()), _output(mine())]
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
        "distance": float((outputs[1] - outputs[0]).norm() / outputs[0].norm()),
        "temporary_bytes": memory[1],
        "baseline_temporary_bytes": memory[0],
    }


def _output(result: object) -> torch.Tensor:
    return (result[0] if isinstance(result, tuple) else result).float()


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
                "%s: %.2f -> %.2f ms, %.2fx; outputs %.1e apart; temporary memory %s",
                record["case"], record["baseline_seconds"] * 1e3, record["seconds"] * 1e3, record["ratio"],
                record["distance"], held,
            )  # fmt: skip
    drift = minimax_drift()
    logger.info("%s", json.dumps(drift))
    if arguments.json:
        results = {
            "threads": torch.get_num_threads(),
            "instruction set": cpu.isa(),
            "cases": records,
            "minimax bfloat16 decode": drift,
        }
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
