"""Decode and prefill of a random-weight Llama of 1.1 B parameters: transformers against hasten,
step by step in turn."""

import argparse
import copy
import json
import logging
import statistics
from collections.abc import Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hasten
from hasten.acceleration.measure import seconds
from hasten.bench.runner import bandwidth
from hasten.kernels import backend
from hasten.model_facts import device_of, progress

logger = logging.getLogger("hasten.bench")

PROMPT_TOKENS, PREFILL_TOKENS, CALIBRATION_TOKENS, COUNTED_TOKENS = 32, 1024, 512, 24
WARMUP = 3


def llama_1b(dtype: torch.dtype = torch.bfloat16, device: str = "cpu", layers: int = 22) -> LlamaForCausalLM:
    """A Llama of TinyLlama's shape (hidden 2048, intermediate 5632, 4 KV heads, vocabulary 32,000),
    with random weights."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=4096,
    )
    return random_model(config, dtype, device)


def random_model(config: LlamaConfig, dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    """A Llama whose matrices are tiles of one block of random numbers, which takes seconds instead of minutes."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    model.to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    tile = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    for i, parameter in enumerate(model.parameters()):
        if parameter.dim() == 1:
            parameter.data.fill_(1)
            continue
        values = parameter.data.view(-1)
        shifted = tile.roll(7919 * i) / config.hidden_size**0.5
        for part in values.split(tile.numel()):
            part.copy_(shifted[: part.numel()])
    return model.eval().requires_grad_(False)


def shared_copy(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy of `model` over the very same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


@torch.no_grad()
def compare(
    sparsities: Sequence[float] = (0.5, 0.65),
    steps: int = 32,
    prefill: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
) -> list[dict]:
    """Times the dense model in transformers, with `DenseDecode`, and with `Wina` at each sparsity, batch 1.

    One decode step of each model after the other, so that all of them see the same machine; every model reads gigabytes
    a step, so weights are cold.

    Args:
        sparsities: of the Wina models.
        steps: measured decode steps of each model, after WARMUP more.
        prefill: also time a prefill of PREFILL_TOKENS tokens, three rounds.

    Returns:
        records of `hasten.bench.runner`; the limit is the memory's bandwidth, measured between the steps, over the
        weights that a step must read, by the share of inputs that was counted as active.
    """
    base = llama_1b(dtype, device)
    ids = torch.randint(32000, (1, PREFILL_TOKENS), generator=torch.Generator().manual_seed(1))
    models = {"transformers": base, "dense": shared_copy(base)}
    reports = {"dense": hasten.accelerate(models["dense"], hasten.DenseDecode(), measure_speed=False)}
    if sparsities:
        calibration = hasten.calibrate(base, hasten.Wina(), ids[:, :CALIBRATION_TOKENS])
        counted_on = ids[:, CALIBRATION_TOKENS : CALIBRATION_TOKENS + COUNTED_TOKENS]
        for sparsity in sparsities:
            name = f"wina {sparsity:.0%}"
            models[name] = copy.deepcopy(base)
            reports[name] = hasten.accelerate(
                models[name],
                hasten.Wina(sparsity),
                calibration=calibration,
                heldout=counted_on,
                measure_speed=False,
            )

    times, bandwidths = decode_steps(models, ids, steps)
    limits = {name: bytes_read(base, reports.get(name)) / statistics.median(bandwidths) for name in models}
    for name, report in reports.items():
        growth = report.memory_after / report.memory_before - 1
        share = report.techniques[0].active_share or 1.0
        logger.info(
            "%s: %+.2f %% of the dense model's memory, %.1f %% of inputs active", name, 100 * growth, 100 * share
        )
    records = records_of("decode", times, limits, dtype, device)
    if prefill:
        rounds = {name: [] for name in models}
        for _ in progress(range(3), "prefill", unit="round"):
            for name, model in models.items():
                rounds[name].append(seconds(lambda model=model: model(ids.to(device)), device_of(model)))
        records += records_of("prefill", rounds, dict.fromkeys(models), dtype, device)
    return records


def decode_steps(models: dict, ids: torch.Tensor, steps: int) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of each decode step of each model, one step of each in turn, and the bandwidths measured between."""
    device = device_of(models["transformers"])
    ids = ids.to(device)
    caches = {name: model(ids[:, :PROMPT_TOKENS], use_cache=True).past_key_values for name, model in models.items()}
    times, bandwidths = {name: [] for name in models}, []
    for step in progress(range(WARMUP + steps), "decoding", unit="step"):
        token = ids[:, PROMPT_TOKENS + step : PROMPT_TOKENS + step + 1]
        for name, model in models.items():
            work = lambda model=model, cache=caches[name], token=token: model(token, past_key_values=cache)  # noqa: E731
            times[name].append(seconds(work, device))
        if step % 4 == 0:
            bandwidths.append(bandwidth(device.type, step))
    return {name: values[WARMUP:] for name, values in times.items()}, bandwidths


def bytes_read(model: LlamaForCausalLM, report: hasten.Report | None) -> float:
    """Bytes of weights that a decode step must read: of the layers, those of the inputs that were counted as active;
    and the head."""
    share = report.techniques[0].active_share if report else None
    layers = sum(m.weight.nbytes for m in model.model.modules() if isinstance(m, torch.nn.Linear))
    return layers * (1.0 if share is None else share) + model.lm_head.weight.nbytes


def records_of(
    op: str, times: dict[str, list[float]], limits: dict[str, float | None], dtype, device, size: str = "1.1B"
) -> list[dict]:
    """One record per model and baseline: transformers, and hasten's own dense model.
    Seconds are medians over steps taken in turn."""
    records = []
    for name, own in times.items():
        for baseline, label in (("transformers", "transformers"), ("dense", "hasten dense")):
            if name == "transformers" or name == baseline:
                continue
            median = statistics.median(own)
            records.append(
                {
                    "op": op,
                    "case": f"{size} {name}",
                    "dtype": str(dtype).removeprefix("torch."),
                    "device": device,
                    "backend": backend.choose(torch.empty(0, dtype=dtype, device=device)),
                    "baseline": label,
                    "seconds": median,
                    "baseline_seconds": statistics.median(times[baseline]),
                    "ratio": statistics.median(times[baseline]) / median,
                    "share_of_limit": limits[name] / median if limits[name] else None,
                }
            )
    return records


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    results = compare(steps=arguments.steps, prefill=True)
    for record in results:
        print(
            f"{record['op']:8} {record['case']:16} against {record['baseline']:13} "
            f"{record['seconds'] * 1e3:8.2f} ms  {record['ratio']:.2f}x"
        )
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)
