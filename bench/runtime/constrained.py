"""Constrained generation, batch 1: AWRS against masks, against a predicate asked about the whole vocabulary, and against transformers' loop.

Run by hand: `python -m hasten.bench.runtime.constrained [--json FILE]` from outside the repository's root.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import transformers

import hasten
from hasten.bench.runtime.decode import random_model
from hasten.generation import generate
from hasten.guidance.constraints import Constraint, JsonSchema, Predicate, Regex

PROMPT = "def read(self):\n    "
WIDE = 128_000
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "kind": {"enum": ["file", "folder", "link"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9999}, "maxItems": 4},
    },
    "required": ["name", "kind", "sizes"],
    "additionalProperties": False,
}
CONSTRAINTS = {
    "JSON schema": JsonSchema(SCHEMA, whitespace="[ ]?"),
    "regex": Regex(r"[a-z ]{200,}"),
    "predicate": Predicate(lambda text: "q" not in text and text.count("\n") < 20),
}


@dataclass(frozen=True)
class Way:
    """One way to generate, and how many tokens are worth timing."""

    constraint: Constraint | None
    method: str
    tokens: int


def embedded():
    folder = hasten.embedded_model()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False), transformers.AutoTokenizer.from_pretrained(folder)


def wide():
    """A random Llama with a vocabulary of 128,000: all bytes, and random lower-case words with and without a space before them."""
    names = list(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    known, generator = set(names), torch.Generator().manual_seed(0)
    for row in torch.randint(26, (2 * WIDE, 8), generator=generator).tolist():
        word = "".join(chr(97 + letter) for letter in row[: 2 + row[0] % 6])
        for name in (word, "Ġ" + word):
            if name not in known and len(names) < WIDE - 1:
                known.add(name)
                names.append(name)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({name: token for token, name in enumerate(sorted(names))}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4, vocab_size=WIDE,
        eos_token_id=WIDE - 1,
    )  # fmt: skip
    return random_model(config, torch.float32, "cpu"), tokenizer


def transformers_loop(model, tokenizer, tokens: int) -> int:
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(
        **inputs, do_sample=True, top_k=0, max_new_tokens=tokens, pad_token_id=tokenizer.eos_token_id
    )
    return output.shape[1] - inputs["input_ids"].shape[1]


def measure(name: str, model, tokenizer, rounds: int) -> list[dict]:
    """Milliseconds per token of every way, one after the other in each round: medians, and medians of the ratios to AWRS."""
    ways = {"hasten, no constraint": Way(None, "awrs", 96)}
    for kind, constraint in CONSTRAINTS.items():
        ways[f"{kind}, AWRS"] = Way(constraint, "awrs", 64)
        slow = kind == "predicate" and len(tokenizer) > 10_000
        ways[f"{kind}, {'whole vocabulary' if kind == 'predicate' else 'mask'}"] = Way(
            constraint, "mask", 4 if slow else 64
        )
    times: dict[str, list[float]] = {way: [] for way in ["transformers, no constraint", *ways]}
    checks: dict[str, list[float]] = {way: [] for way in ways}
    for seed in range(rounds + 1):  # the first is for warming up
        for label in times:
            torch.manual_seed(seed)
            begin = time.perf_counter()
            if label in ways:
                way = ways[label]
                result = generate(
                    model, tokenizer, PROMPT, constraint=way.constraint, method=way.method, max_new_tokens=way.tokens,
                    seed=seed, on_dead="return",
                )  # fmt: skip
                tokens = len(result.tokens)
                whole = len(tokenizer) if "whole" in label else result.checks_per_token
                checks[label] += [whole] if seed else []
            else:
                tokens = transformers_loop(model, tokenizer, 96)
            times[label] += [(time.perf_counter() - begin) / tokens] if seed else []
    records = []
    for label, seconds in times.items():
        base = "transformers, no constraint" if "no constraint" in label else label.split(",")[0] + ", AWRS"
        ratios = [own / other for own, other in zip(seconds, times[base], strict=True)]
        records.append({
            "model": name, "way": label, "ms_per_token": 1e3 * statistics.median(seconds), "times_of": base,
            "times": statistics.median(ratios), "checks_per_token": statistics.mean(checks.get(label) or [0]),
        })  # fmt: skip
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the records")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    records = []
    for name, build in {"stdlib-llama (4k)": embedded, "random Llama (128k)": wide}.items():
        records += measure(name, *build(), arguments.rounds)
    for record in records:
        print(
            f"{record['model']:20} {record['way']:34} {record['ms_per_token']:9.2f} ms/token  "
            f"{record['times']:7.2f} x {record['times_of']:30} {record['checks_per_token']:9.1f} checks/token"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"threads": torch.get_num_threads(), "records": records}, indent=2) + "\n")


if __name__ == "__main__":
    main()
