"""AWRS with sequential Monte Carlo: hasten against genlm-control 0.4.1, each in its own environment,
on the same models.

Run by hand from outside the repository's root:

    python -m venv peer
    peer/bin/pip install "torch==2.13.0" "genlm-control==0.4.1" "transformers>=5,<6"    # torch for CPUs; 107 packages
    python -m hasten.bench.runtime.genlm_comparison --genlm-python peer/bin/python [--json FILE]

Both sides get the same folder with a model in float32, prompt, constraint, temperature 1, number of particles and of
tokens, ESS threshold 0.5, multinomial resampling and number of threads; they take turns, seed by seed. Tokens per
second: tokens that particles of weight above 0 hold at the end, over the seconds of the call that generates them; the
medians over seeds and their ratio are printed. Loading, compiling the constraint and building the sampler are excluded,
on both sides, as far as the interfaces allow (`hasten.generate` binds the constraint in the call, and
genlm-control's sampler is built before its own).

genlm-control waits up to 20 ms for queries that fill a batch of 20. So it runs as it is installed, and a second time
with batches of exactly as many queries as there are particles and no more than 1 ms of waiting;
the ratio is to the faster of the two.

Not the same on both sides: genlm-control's target is texts that end within the limit (an end is forced and weighted
there), hasten's texts that are complete at it; the JSON of genlm-control may have its properties in any order and more
whitespace. genlm-control gives weight 0 where less than 1e-5 of the law is valid;
where all its particles end so, there is no ratio.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sysconfig
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import tokenizers
import torch
import transformers

import hasten
from hasten.bench.runtime.constrained import PROMPT, SCHEMA
from hasten.bench.runtime.decode import random_model
from hasten.generation.generation import generate
from hasten.guidance.text.constraints import JsonSchema, Regex

ESS_THRESHOLD, RESAMPLING = 0.5, "multinomial"
BATCHINGS = {"as installed": {}, "no waiting": {"timeout": 0.001}}
VOCABULARY = 32_000


LIST_PROMPT = "first = [1, 2, 3, 4]\nsecond = [2, 4, 6, 8]\nthird = "
LIST = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9999}, "maxItems": 6}


@dataclass(frozen=True)
class Problem:
    """What is generated, and how much of it is worth timing."""

    model: str
    kind: str
    constraint: str
    tokens: int
    seeds: int
    prompt: str = PROMPT
    particles: tuple[int, ...] = (5, 20)


TRAINED, RANDOM = "stdlib-llama (4k)", "random Llama (32k)"
PROBLEMS = (
    Problem(TRAINED, "regex", "[a-z_ ]+", 32, 5),
    Problem(TRAINED, "regex", "[a-z_ ]+", 128, 2),
    Problem(TRAINED, "JSON list", json.dumps(LIST), 32, 3, LIST_PROMPT),
    Problem(TRAINED, "JSON object", json.dumps(SCHEMA), 64, 2),
    Problem(RANDOM, "regex", "[a-z_ ]+", 32, 3),
    Problem(RANDOM, "JSON object", json.dumps(SCHEMA), 64, 1, particles=(5,)),
)


def random_llama(folder: Path) -> Path:
    """A random Llama with a byte-level BPE of 32,000 tokens, trained on the standard library's own text."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in library.rglob("*.py") if "site-packages" not in path.parts)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator((path.read_text("utf-8", "ignore") for path in files), trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(folder)
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        vocab_size=backend.get_vocab_size(), bos_token_id=None, eos_token_id=backend.token_to_id("<eos>"),
    )  # fmt: skip
    random_model(config, torch.float32, "cpu").save_pretrained(folder)
    return folder


class Peer:
    """genlm-control in a process of its own."""

    def __init__(self, python: Path, threads: int):
        side = Path(__file__).with_name("genlm_side.py")
        environment = {**os.environ, "PYTHONSAFEPATH": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [python, side, str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.versions = self._answer()

    def generate(self, job: dict) -> dict:
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"genlm-control's side has ended with status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


class Ours:
    """hasten, in this process."""

    def __init__(self, folder: Path):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._model, self.tokenizer = (
            model.eval().requires_grad_(False),
            transformers.AutoTokenizer.from_pretrained(folder),
        )

    def generate(self, job: dict) -> dict:
        begin = time.perf_counter()
        constraint = Regex(job["constraint"]) if job["kind"] == "regex" else JsonSchema(json.loads(job["constraint"]))
        result = generate(
            self._model, self.tokenizer, job["text"], constraint=constraint,
            particles=job["particles"], max_new_tokens=job["tokens"], temperature=job["temperature"], seed=job["seed"],
            ess_threshold=job["ess_threshold"], resampling=job["resampling"], on_dead="return",
        )  # fmt: skip
        seconds = time.perf_counter() - begin
        alive = [text.log_weight > -math.inf for text in result.particles]
        kept = sum(len(text.tokens) for text, lives in zip(result.particles, alive, strict=True) if lives)
        return {"seconds": seconds, "kept": kept, "alive": sum(alive) / len(alive), "log_z": result.log_z}


def compare(problem: Problem, folder: Path, peer: Peer, particles: int) -> list[dict]:
    """A record for hasten and for each way to run genlm-control. Seed 0 is for warming up."""
    ours = Ours(folder)
    job = {
        "folder": str(folder), "prompt": ours.tokenizer(problem.prompt)["input_ids"], "text": problem.prompt,
        "temperature": 1.0, "kind": problem.kind, "constraint": problem.constraint,
        "tokens": problem.tokens, "particles": particles,
        "ess_threshold": ESS_THRESHOLD, "resampling": RESAMPLING,
    }  # fmt: skip
    batchings = {**BATCHINGS, "no waiting": {**BATCHINGS["no waiting"], "batch_size": particles}}
    ways = {"hasten": ours.generate}
    for name, batching in batchings.items():
        ways[f"genlm-control, {name}"] = lambda job, batching=batching: peer.generate(job | {"batching": batching})
    runs: dict[str, list[dict]] = {way: [] for way in ways}
    for seed in range(problem.seeds + 1):
        for way, run in ways.items():
            result = run(job | {"seed": seed})
            runs[way] += [result] if seed else []
    records = []
    for way, results in runs.items():
        rates = [result["kept"] / result["seconds"] for result in results]
        records.append({
            "problem": asdict(problem), "particles": particles, "way": way,
            "tokens_per_second": statistics.median(rates),
            "milliseconds": 1e3 * statistics.median(result["seconds"] for result in results),
            "kept": statistics.median(result["kept"] for result in results),
            "alive": statistics.mean(result["alive"] for result in results),
            "log_z": [result["log_z"] if math.isfinite(result["log_z"]) else None for result in results],
        })  # fmt: skip
    fastest = max(record["tokens_per_second"] for record in records[1:])
    records[0]["times_of_fastest_peer"] = records[0]["tokens_per_second"] / fastest if fastest else None
    return records


def show(record: dict) -> None:
    problem = record["problem"]
    ratio = record.get("times_of_fastest_peer")
    print(
        f"{problem['model']:19} {problem['kind']:11} {problem['tokens']:4} tokens {record['particles']:3} particles  "
        f"{record['way']:28} {record['tokens_per_second']:9.1f} tokens/s  "
        f"{record['kept']:5.0f} kept in {record['milliseconds']:9.1f} ms  "
        f"{record['alive']:4.0%} alive" + (f"  {ratio:6.2f} x the faster peer" if ratio else ""),
        flush=True,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--genlm-python", type=Path, required=True, help="the interpreter that has genlm-control")
    parser.add_argument("--json", type=Path, help="write the records")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="", help="problems whose model and kind contain this")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    peer, records = Peer(arguments.genlm_python, arguments.threads), []
    with tempfile.TemporaryDirectory() as scratch:
        chosen = [problem for problem in PROBLEMS if arguments.only in f"{problem.model} {problem.kind}"]
        folders = {TRAINED: hasten.embedded_model()}
        if any(problem.model == RANDOM for problem in chosen):
            folders[RANDOM] = random_llama(Path(scratch))
        for problem in chosen:
            for particles in problem.particles:
                records += (found := compare(problem, folders[problem.model], peer, particles))
                for record in found:
                    show(record)
    peer.close()
    if arguments.json:
        versions = {
            "hasten": {package: version(package) for package in ("hasten", "torch", "transformers", "llguidance")}
        }
        document = {"threads": arguments.threads, "versions": versions | {"peer": peer.versions}, "records": records}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
