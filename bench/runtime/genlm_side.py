"""The side of genlm-control in `genlm_comparison`: reads jobs from stdin, one JSON document a line,
and answers each with one.

Run by the interpreter of an environment that has genlm-control, and not hasten.
"""

import asyncio
import json
import platform
import sys
import time
from functools import cache
from importlib.metadata import version

import torch
from genlm.control import AWRS, BoolFSA, JsonSchema, PromptedLLM

PACKAGES = ("genlm-control", "genlm-backend", "torch", "transformers")


@cache
def language_model(folder: str, temperature: float, batching: tuple) -> PromptedLLM:
    options = {"device_map": "cpu", "torch_dtype": torch.float32}
    return PromptedLLM.from_name(folder, backend="hf", temperature=temperature, hf_opts=options, **dict(batching))


@cache
def condition(folder: str, temperature: float, batching: tuple, kind: str, text: str):
    llm = language_model(folder, temperature, batching)
    potential = BoolFSA.from_regex(text) if kind == "regex" else JsonSchema(json.loads(text))
    return potential.coerce(llm, f=b"".join)


def generate(job: dict) -> dict:
    """One call of AWRS with SMC; only `smc` itself is timed.

    The limit is one token higher than hasten's, since the last token under it is an end that is not drawn,
    and is not counted.
    """
    batching = tuple(sorted(job["batching"].items()))
    llm = language_model(job["folder"], job["temperature"], batching)
    checked = condition(job["folder"], job["temperature"], batching, job["kind"], job["constraint"])
    llm.prompt_ids = job["prompt"]
    llm.model.clear_cache()  # of the probabilities from calls before
    torch.manual_seed(job["seed"])
    sampler = AWRS(llm, checked, seed=job["seed"])
    begin = time.perf_counter()
    sequences = asyncio.run(
        sampler.smc(job["particles"], job["ess_threshold"], job["tokens"] + 1, resampling_method=job["resampling"])
    )
    seconds = time.perf_counter() - begin
    alive = [weight > float("-inf") for weight in sequences.log_weights]
    kept = [min(len(context), job["tokens"]) for context, lives in zip(sequences.contexts, alive, strict=True) if lives]
    return {"seconds": seconds, "kept": sum(kept), "alive": sum(alive) / len(alive), "log_z": float(sequences.log_ml)}


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(int(sys.argv[1]))
    versions = {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}
    print(json.dumps(versions), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(generate(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
