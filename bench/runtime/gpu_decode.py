"""Whole decode steps on a GPU, captured in CUDA graphs (static cache): an 8 B-shaped random Llama,
eager transformers against hasten."""

import argparse
import copy
import json

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import hasten
from hasten.bench.runner import bandwidth
from hasten.bench.runtime.decode import PROMPT_TOKENS, bytes_read, random_model, records_of, shared_copy
from hasten.model_facts import progress

CACHE_TOKENS = 256
CALIBRATION_TOKENS = 1024


def llama_8b() -> LlamaForCausalLM:
    """A Llama of the shape of Llama-3-8B, random weights in bfloat16 on the GPU."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=4096,
    )
    return random_model(config, torch.bfloat16, "cuda")


class Step:
    """One decode step of `model` over a static cache: eager, or captured in a CUDA graph and replayed."""

    def __init__(self, model: LlamaForCausalLM, ids: torch.Tensor):
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=CACHE_TOKENS)
        with torch.no_grad():
            model(ids[:, :PROMPT_TOKENS], past_key_values=self.cache, use_cache=True)
        self.token = ids[:, PROMPT_TOKENS : PROMPT_TOKENS + 1].clone()
        self.position = torch.full((1, 1), PROMPT_TOKENS, device="cuda")
        self.mask = (
            torch.arange(CACHE_TOKENS, device="cuda")[None, None, None] <= PROMPT_TOKENS
        )  # [1, 1, 1, CACHE_TOKENS]
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def eager(self) -> torch.Tensor:
        """Logits [1, 1, V] of the next step. Tokens, positions and mask stand still,
        so that every step does the same work."""
        return self.model(
            self.token, attention_mask=self.mask, position_ids=self.position, past_key_values=self.cache, use_cache=True
        ).logits

    def capture(self) -> "Step":
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.eager()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.eager()
        return self

    def rewind(self) -> None:
        """Every run, replayed or not, writes one more position of the cache: back to the end of the prompt."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(PROMPT_TOKENS)

    def run(self) -> None:
        if self.graph:
            self.graph.replay()
        else:
            self.eager()


def gpu_seconds(step: Step) -> float:
    """GPU time of one run."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    step.rewind()
    torch.cuda.synchronize()
    start.record()
    step.run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def compare(steps: int = 40, sparsity: float = 0.5) -> list[dict]:
    """Records of `hasten.bench.runner` for decode at batch 1: eager, and in CUDA graphs transformers,
    hasten dense and hasten at `sparsity`."""
    base = llama_8b()
    ids = torch.randint(128256, (1, CALIBRATION_TOKENS), generator=torch.Generator().manual_seed(1)).cuda()
    dense, sparse = shared_copy(base), copy.deepcopy(base)
    reports = {"dense": hasten.accelerate(dense, hasten.DenseDecode(always=True), measure_speed=False)}
    reports["wina 50%"] = hasten.accelerate(
        sparse, [hasten.Wina(sparsity), hasten.DenseDecode(always=True)], calibration=ids, measure_speed=False
    )
    eager = Step(base, ids)
    runs = {
        "transformers": Step(base, ids).capture(),
        "dense": Step(dense, ids).capture(),
        "wina 50%": Step(sparse, ids).capture(),
    }
    times = {"eager": [], **{name: [] for name in runs}}
    for _ in progress(range(steps), "decoding", unit="step"):
        times["eager"].append(gpu_seconds(eager))
        for name, run in runs.items():
            times[name].append(gpu_seconds(run))
    limit = max(bandwidth("cuda", turn) for turn in range(5))
    limits = {name: bytes_read(base, reports.get(name)) / limit for name in times}
    captured = records_of(
        "decode, CUDA graph", {name: times[name] for name in runs}, limits, torch.bfloat16, "cuda", "8B"
    )
    eager_pair = {"transformers": times["transformers"], "eager": times["eager"], "dense": times["dense"]}
    uncaptured = [
        r for r in records_of("decode", eager_pair, limits, torch.bfloat16, "cuda", "8B") if r["case"].endswith("eager")
    ]
    return captured + uncaptured


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: nothing measured")
    results = compare()
    for record in results:
        tokens = 1 / record["seconds"]
        print(
            f"{record['op']:20} {record['case']:16} {tokens:7.1f} tokens/s  {record['ratio']:.2f}x {record['baseline']}"
        )
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"gpu": torch.cuda.get_device_name(), "records": results}, file, indent=2)
