"""Seconds of a vision tower under `DistinctTiles`: CLIP-L/14 at 336 pixels with random weights, on a document of 5
tiles of which 3 are blank, on a batch of 4 questions about one picture, and where nothing is alike.

Each round runs the dense tower and the technique's in turn, so that ratios are of one run. What looking for duplicates
costs is timed by itself, as a share of the dense tower's time on the same tiles.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from hasten.acceleration.measure import seconds
from hasten.acceleration.techniques.distinct_tiles import DistinctRows
from hasten.sparsity.vision_tokens.duplicates import identical_rows

SIZE = 336


def tower(dtype: torch.dtype) -> CLIPVisionModel:
    """That of LLaVA-1.5, of 0.3 B parameters."""
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=SIZE,
        patch_size=14,
        projection_dim=768,
    )
    torch.manual_seed(0)
    return CLIPVisionModel(config).to(dtype).eval().requires_grad_(False)


def cases(dtype: torch.dtype, device: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Names, and tiles [N, 3, SIZE, SIZE]."""
    noise = torch.randn(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    document = noise.clone()
    document[[1, 3, 4]] = 1.9  # white, as a processor scales it
    yield "5 tiles, 3 of them blank", document
    yield "4 questions about one picture", noise[:1].repeat(4, 1, 1, 1)
    yield "5 tiles, none alike", noise
    yield "1 tile", noise[:1]


@torch.no_grad()
def compare(model: CLIPVisionModel, name: str, tiles: torch.Tensor, rounds: int) -> dict:
    """The record of one case: median seconds of the tower and of the technique, in turn, and of the search alone."""
    own, device = DistinctRows(model, "vision_tower"), tiles.device
    sides = {"dense": [], "own": [], "search": []}
    works = {"dense": lambda: own.dense(tiles), "own": lambda: own(tiles), "search": lambda: identical_rows(tiles)}
    for turn in range(rounds + 1):
        order = list(works) if turn % 2 else list(works)[::-1]
        taken = {side: seconds(works[side], device) for side in order}
        if turn:  # the first warms up
            for side, value in taken.items():
                sides[side].append(value)
    expected, found = own.dense(tiles).last_hidden_state.float(), own(tiles).last_hidden_state.float()
    return {
        "op": "distinct_tiles",
        "case": name,
        "dtype": str(tiles.dtype).removeprefix("torch."),
        "device": device.type,
        "baseline": "dense",
        "computed": len(identical_rows(tiles)[0]),
        "tiles": len(tiles),
        "seconds": statistics.median(sides["own"]),
        "baseline_seconds": statistics.median(sides["dense"]),
        "ratio": statistics.median(dense / own for dense, own in zip(sides["dense"], sides["own"], strict=True)),
        "search_share": statistics.median(
            search / dense for search, dense in zip(sides["search"], sides["dense"], strict=True)
        )
        if len(tiles) > 1
        else 0.0,
        "distance": float((found - expected).norm() / expected.norm()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the records there")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    model = tower(dtype).to(arguments.device)
    records = [compare(model, *case, arguments.rounds) for case in cases(dtype, arguments.device)]
    for record in records:
        print(
            f"{record['case']:32} computes {record['computed']} of {record['tiles']} "
            f"{record['seconds'] * 1e3:8.0f} ms {record['ratio']:5.2f}x  search {record['search_share']:6.3%} "
            f" distance {record['distance']:.1e}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
