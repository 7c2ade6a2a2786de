"""Quality on the embedded model: drift of every technique and allocation against sparsity,
in decode through the real kernels.

Calibrates on the first half of the model's held-out text and measures on the second; the model was trained on neither.
Differences between two techniques are taken token by token, with their standard error,
so that one can tell whether they mean anything.
"""

import argparse
import json
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import hasten
from hasten.acceleration.inference import Inference
from hasten.acceleration.install import installed_on
from hasten.acceleration.measure import counted, drift, heldout_logits
from hasten.acceleration.windows import windows

SPARSITIES = (0.25, 0.4, 0.5, 0.65)
TECHNIQUES = {
    "WINA": hasten.Wina,
    "TEAL": hasten.Teal,
    "WINA greedy": lambda sparsity: hasten.Wina(sparsity, allocation="greedy"),
    "CATS": hasten.Cats,
}
COMPARISONS = (("WINA", "TEAL"), ("WINA greedy", "WINA"))


def measure(tokens: int, sparsities: Sequence[float]) -> tuple[list[dict], list[dict]]:
    """Drift per technique and sparsity over `tokens` tokens, and the comparisons between them."""
    folder = hasten.embedded_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval().requires_grad_(False)
    text = (folder / "heldout.txt").read_text(encoding="utf-8")
    pieces = windows([text], tokenizer, model.config.vocab_size)
    pieces, heldout = (
        pieces[: len(pieces) // 2],
        [part for piece in pieces[len(pieces) // 2 :] for part in piece.split(256)],
    )
    heldout = [part for part in heldout if part.numel() >= 64]
    statistics = hasten.calibrate(model, [hasten.Wina(allocation="greedy"), hasten.Teal(), hasten.Cats()], pieces)
    inference = Inference(model)
    dense = heldout_logits(inference, heldout, tokens)

    rows, kls = [], {}
    for name, technique in TECHNIQUES.items():
        for sparsity in sparsities:
            setting = {"calibration": statistics, "measure_speed": False}
            with (
                hasten.accelerated(model, technique(sparsity), **setting),
                counted(installed_on(model).edits) as activity,
            ):
                fast = heldout_logits(inference, heldout, tokens)
            result = drift(dense, fast)
            kls[name, sparsity] = per_token_kl(dense, fast)
            rows.append(
                {
                    "technique": name,
                    "sparsity": sparsity,
                    "active_share": activity.share,
                    "kl": result.kl,
                    "kl_standard_error": standard_error(kls[name, sparsity]),
                    "top1": result.top1,
                    "dense_perplexity": result.dense_perplexity,
                    "fast_perplexity": result.fast_perplexity,
                    "tokens": result.tokens,
                }
            )
            print("{technique:12} {sparsity:.0%}  active {active_share:.1%}  KL {kl:.4f} ± {kl_standard_error:.4f}  "
                  "top-1 {top1:.1%}  perplexity {dense_perplexity:.2f} -> {fast_perplexity:.2f}".format(**rows[-1]),
                  flush=True)  # fmt: skip
    comparisons = []
    for better, worse in COMPARISONS:
        for sparsity in sparsities:
            difference = kls[better, sparsity] - kls[worse, sparsity]
            comparisons.append(
                {
                    "comparison": f"{better} - {worse}",
                    "sparsity": sparsity,
                    "kl_difference": float(difference.mean()),
                    "standard_error": standard_error(difference),
                }
            )
            print(
                "{comparison:26} {sparsity:.0%}  {kl_difference:+.4f} ± {standard_error:.4f}".format(**comparisons[-1])
            )
    return rows, comparisons


def per_token_kl(dense, fast) -> torch.Tensor:
    p, q = (F.log_softmax(torch.cat([logits for _, logits in results]).double(), -1) for results in (dense, fast))
    return (p.exp() * (p - q)).sum(-1)


def standard_error(values: torch.Tensor) -> float:
    return float(values.std()) / math.sqrt(values.numel())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    drifts, differences = measure(arguments.tokens, arguments.sparsities)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"model": "stdlib-llama (embedded)", "drift": drifts, "comparisons": differences}, file, indent=2)
