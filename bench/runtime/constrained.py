"""Constrained generation, batch 1: AWRS against masks, against a predicate asked about the whole vocabulary,
and against transformers' loop.

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
from hasten.generation.generation import generate
from hasten.guidance.text.constraints import Constraint, JsonSchema, Predicate, Regex

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


def without_q(text: str) -> bool:
    """Some 0.3 us a call."""
    return "q" not in text and text.count("\n") < 20


def brackets(text: str) -> bool:
    """No bracket closes that is not open: a loop in Python, some 0.1 us for each character of the text."""
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return False
    return True


CONSTRAINTS = {
    "JSON schema": JsonSchema(SCHEMA, whitespace="[ ]?"),
    "regex": Regex(r"[a-z ]{200,}"),
    "predicate": Predicate(without_q),
    "slower predicate": Predicate(brackets),
}


@dataclass(frozen=True)
class Way:
    """One way to generate, and how many tokens are worth timing.

    method: of hasten; "transformers": its own loop, which for a predicate asks the function about every token.
    """

    constraint: Constraint | None
    method: str
    tokens: int
    checks: int | None = None


class WholeVocabulary(transformers.LogitsProcessor):
    """A function asked about every token, by plain Python: what there is to do without a sampler that
    asks about few."""

    def __init__(self, function, pieces: list[str], begin: int):
        self._function, self._pieces, self._begin = function, pieces, begin

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        text = "".join(self._pieces[token] for token in input_ids[0, self._begin :].tolist())
        refused = [not self._function(text + piece) for piece in self._pieces]
        return scores.masked_fill(torch.tensor(refused), -torch.inf)


def embedded():
    folder = hasten.embedded_model()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False), transformers.AutoTokenizer.from_pretrained(folder)


def wide():
    """A random Llama with a vocabulary of 128,000: all bytes, and random lower-case words with and
    without a space before them."""
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


def transformers_loop(model, tokenizer, way: Way, pieces: list[str]) -> int:
    """The number of tokens that were generated."""
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    begin = inputs["input_ids"].shape[1]
    processors = [WholeVocabulary(way.constraint.function, pieces, begin)] if way.constraint else []
    output = model.generate(
        **inputs, do_sample=True, top_k=0, max_new_tokens=way.tokens, pad_token_id=tokenizer.eos_token_id,
        logits_processor=processors,
    )  # fmt: skip
    return output.shape[1] - begin


def ways(vocabulary: int) -> dict[str, Way]:
    found = {
        "transformers, no constraint": Way(None, "transformers", 96),
        "hasten, no constraint": Way(None, "awrs", 96),
    }
    for kind, constraint in CONSTRAINTS.items():
        asked = isinstance(constraint, Predicate)
        # Equal on all sides, since a predicate costs more on longer texts; few where asking about every token takes
        # seconds.
        tokens = 64 if vocabulary < 10_000 or not asked else 24
        found[f"{kind}, AWRS"] = Way(constraint, "awrs", tokens)
        if not asked:
            found[f"{kind}, mask"] = Way(constraint, "mask", tokens)
            continue
        found[f"{kind}, whole vocabulary"] = Way(constraint, "mask", tokens, vocabulary)
        found[f"{kind}, transformers"] = Way(constraint, "transformers", tokens, vocabulary)
    return found


def measure(name: str, model, tokenizer, rounds: int) -> list[dict]:
    """Milliseconds per token of every way, one after the other in each round: medians,
    and medians of the ratios to AWRS."""
    chosen = ways(len(tokenizer))
    pieces = [tokenizer.decode([token], skip_special_tokens=True) for token in range(len(tokenizer))]
    times: dict[str, list[float]] = {label: [] for label in chosen}
    checks: dict[str, list[float]] = {label: [] for label in chosen}
    for seed in range(rounds + 1):  # the first is for warming up
        for label, way in chosen.items():
            torch.manual_seed(seed)
            begin, asked = time.perf_counter(), way.checks or 0
            if way.method == "transformers":
                tokens = transformers_loop(model, tokenizer, way, pieces)
            else:
                result = generate(
                    model, tokenizer, PROMPT, constraint=way.constraint, method=way.method, max_new_tokens=way.tokens,
                    seed=seed, on_dead="return",
                )  # fmt: skip
                tokens, asked = len(result.tokens), way.checks or result.checks_per_token
            times[label] += [(time.perf_counter() - begin) / tokens] if seed else []
            checks[label] += [asked] if seed else []
    records = []
    for label, seconds in times.items():
        base = "transformers, no constraint" if "no constraint" in label else label.split(",")[0] + ", AWRS"
        ratios = [own / other for own, other in zip(seconds, times[base], strict=True)]
        records.append({
            "model": name, "way": label, "ms_per_token": 1e3 * statistics.median(seconds), "times_of": base,
            "times": statistics.median(ratios), "checks_per_token": statistics.mean(checks[label]),
        })  # fmt: skip
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the records")
    parser.add_argument("--rounds", type=int, default=3)
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
