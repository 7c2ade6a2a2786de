"""Time to first token, decode and KV bytes under `VisionTokens`, on a LLaVA-1.5 of about 1.1 B parameters with random
weights: CLIP-L/14 at 336 pixels before a Llama of 22 layers, 576 tokens an image.

Each round runs the unmodified model and every variant in turn, so that ratios are of one run. The plainest alternative
stands beside them: a picture of a quarter of the patches, whose other tokens no layer ever sees.
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPVisionConfig, DynamicCache, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import hasten
from hasten.acceleration.anatomy import Anatomy
from hasten.acceleration.measure import seconds
from hasten.acceleration.techniques.vision_token_layers import PrunedLayer
from hasten.acceleration.techniques.vision_token_pass import Drop, VisionTokenPruning
from hasten.acceleration.techniques.vision_token_search import tried
from hasten.acceleration.techniques.vision_tokens import layer_shapes
from hasten.model_facts import device_of
from hasten.sparsity.vision_tokens import prefill_cost

IMAGE_TOKEN, TEXT_TOKENS, DECODE_STEPS = 32000, 64, 8
PER_IMAGE = 576
QUARTER = hasten.FastV(layer=2, keep=0.25)
VARIANTS = {
    "FastV(2, 0.25)": hasten.VisionTokens(QUARTER),
    "FastV(2, 0.25), vision": hasten.VisionTokens(QUARTER, score="vision"),
    "FastV(2, 0.25), text_raters": hasten.VisionTokens(QUARTER, score="text_raters"),
    "FastV(2, 0.25), random": hasten.VisionTokens(QUARTER, score="random"),
    "FastV(2, 0.25), merge": hasten.VisionTokens(QUARTER, mode="merge"),
    "Pyramid()": hasten.VisionTokens(hasten.Pyramid()),
}
DENSE, SMALLER = "unmodified", "a quarter of the patches"


def llava(dtype: torch.dtype = torch.bfloat16, hidden: int = 2048, layers: int = 22, inner: int = 5632) -> nn.Module:
    """LLaVA-1.5's shape around a Llama of `layers` layers; by default 1.4 B parameters, 0.3 B of them the tower's."""
    text = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 128,
        vocab_size=32064,
        max_position_embeddings=8192,
    )
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return LlavaForConditionalGeneration(config).eval()  # with gradients, as from_pretrained returns it
    finally:
        torch.set_default_dtype(default)


@dataclass(frozen=True)
class Prompt:
    """Text, the placeholders of pictures, and text again; the pictures as random pixels."""

    pictures: int
    tokens: int  # of each picture

    def inputs(self, model: nn.Module, pixels: bool) -> dict[str, torch.Tensor]:
        device, generator = device_of(model), torch.Generator().manual_seed(1)
        ids = torch.randint(10, 31000, (1, TEXT_TOKENS + self.pictures * self.tokens), generator=generator)
        ids[:, 8 : 8 + self.pictures * self.tokens] = IMAGE_TOKEN
        given = {"input_ids": ids.to(device)}
        if pixels:
            values = torch.randn(self.pictures, 3, 336, 336, generator=generator)
            given["pixel_values"] = values.to(device, next(model.parameters()).dtype)
        return given


@contextlib.contextmanager
def clocked(spent: list[float]) -> Iterator[None]:
    """While open, adds to `spent` the seconds that all of hasten's own work takes outside of the model's layers; on a
    GPU that of the launches alone."""
    places = [
        (VisionTokenPruning, "begin"),
        (VisionTokenPruning, "scores"),
        (VisionTokenPruning, "drop"),
        (VisionTokenPruning, "restore"),
        (PrunedLayer, "_shortened"),
        (Drop, "__call__"),
    ]
    kept = {place: getattr(*place) for place in places}

    def timed(method):
        def call(*arguments, **keywords):
            begin = time.perf_counter()
            result = method(*arguments, **keywords)
            spent[0] += time.perf_counter() - begin
            return result

        return call

    for (owner, name), method in kept.items():
        setattr(owner, name, timed(method))
    try:
        yield
    finally:
        for (owner, name), method in kept.items():
            setattr(owner, name, method)


@torch.no_grad()
def compare(model: nn.Module, pictures: int, rounds: int, pixels: bool, variants: dict) -> list[dict]:
    """Records of one prompt: for each variant, median seconds of the prefill (with the tower where `pixels`) and of a
    decode step after it, in turn with the unmodified model's, and the bytes of its cache."""
    device = device_of(model)
    prompts = {name: Prompt(pictures, PER_IMAGE) for name in (DENSE, *variants)}
    if not pixels:
        prompts[SMALLER] = Prompt(pictures, PER_IMAGE // 4)
    prefills = {name: [] for name in prompts}
    steps, overhead, sizes = {name: [] for name in prompts}, {name: [] for name in prompts}, {}
    for turn in range(rounds + 1):
        for name, prompt in prompts.items():
            inputs, cache, spent = prompt.inputs(model, pixels), DynamicCache(config=model.config.text_config), [0.0]
            with clocked(spent), tried(model, variants.get(name)):

                def prefill(inputs=inputs, cache=cache):
                    model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)

                taken = seconds(prefill, device)
                chosen = spent[0]
                token = torch.full((1, 1), 7, device=device)

                def step(token=token, cache=cache):
                    model(input_ids=token, past_key_values=cache, use_cache=True)

                sizes[name] = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
                stepped = [seconds(step, device) for _ in range(DECODE_STEPS)]
            if turn:  # the first warms up
                prefills[name].append(taken)
                overhead[name].append(chosen / taken)
                steps[name].append(statistics.median(stepped))
    shapes = layer_shapes(Anatomy(model))
    records = []
    for name in (*variants, *([] if pixels else [SMALLER])):
        ratios = [dense / own for dense, own in zip(prefills[DENSE], prefills[name], strict=True)]
        decodes = [dense / own for dense, own in zip(steps[DENSE], steps[name], strict=True)]
        record = {
            "op": "vision_tokens",
            "case": f"{pictures * PER_IMAGE} image tokens{', with the tower' if pixels else ''}, {name}",
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "device": device.type,
            "baseline": DENSE,
            "seconds": statistics.median(prefills[name]),
            "baseline_seconds": statistics.median(prefills[DENSE]),
            "ratio": statistics.median(ratios),
            "decode_ratio": statistics.median(decodes),
            "decode_seconds": statistics.median(steps[name]),
            "choosing_share": statistics.median(overhead[name]),
            "kv_bytes": sizes[name],
            "kv_share": sizes[name] / sizes[DENSE],
        }
        if name in variants:
            shares = variants[name].schedule.shares(len(shapes))
            expected, whole = (
                prefill_cost(each, TEXT_TOKENS, pictures * PER_IMAGE, shapes) for each in (shares, (1.0,) * len(shapes))
            )
            record["expected_ratio"] = whole.operations / expected.operations
            record["expected_kv_share"] = expected.kv_bytes / whole.kv_bytes
        records.append(record)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, nargs="*", default=[1, 5])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--variants", nargs="*", help="parts of the names of variants; all if there is none")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--large", action="store_true", help="a Llama of 7 B parameters, as LLaVA-1.5 has")
    parser.add_argument("--json", type=Path, help="write the records there")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    large = {"hidden": 4096, "layers": 32, "inner": 11008} if arguments.large else {}
    with torch.device(arguments.device):
        model = llava(getattr(torch, arguments.dtype), **large)
    chosen = {
        name: technique
        for name, technique in VARIANTS.items()
        if not arguments.variants or any(part.lower() in name.lower() for part in arguments.variants)
    }
    records = []
    for pictures in arguments.pictures:
        for pixels in (False, True):
            named = {name: t for name, t in chosen.items() if pixels or t.score != "vision"}
            records += compare(model, pictures, arguments.rounds, pixels, named)
    for record in records:
        expected = f"(operations say {record['expected_ratio']:.2f})" if "expected_ratio" in record else ""
        print(
            f"{record['case']:62} {record['seconds'] * 1e3:8.0f} ms {record['ratio']:5.2f}x {expected:22} choosing "
            f"{record['choosing_share']:5.1%}  decode {record['decode_ratio']:.2f}x  KV {record['kv_share']:.0%}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
