"""The benchmark of decode, on a model small enough for a test."""

import pytest
import torch
import transformers

from hasten.bench.runtime import decode


def test_decode_and_prefill_of_every_model_against_both_baselines(monkeypatch):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, vocab_size=32000, max_position_embeddings=2048)
    model = decode.random_model(config, torch.float32, "cpu")
    reports = []
    monkeypatch.setattr(decode, "llama_1b", lambda dtype, device: model)
    monkeypatch.setattr(decode, "bandwidth", lambda device, turn: 1e9)
    read = decode.bytes_read
    monkeypatch.setattr(decode, "bytes_read", lambda base, report: reports.append(report) or read(base, report))
    records = decode.compare(sparsities=(0.5,), steps=2, prefill=True, dtype=torch.float32)
    assert [(record["op"], record["case"], record["baseline"]) for record in records] == [
        (op, f"1.1B {name}", baseline)
        for op in ("decode", "prefill")
        for name, baseline in (
            ("dense", "transformers"),
            ("wina 50%", "transformers"),
            ("wina 50%", "hasten dense"),
        )
    ]
    assert all((record["share_of_limit"] is None) == (record["op"] == "prefill") for record in records)

    layers, head = 2 * (4 * 64 * 64 + 3 * 64 * 96) * 4, 32000 * 64 * 4
    untouched, dense, sparse = reports
    assert untouched is None and read(model, untouched) == read(model, dense) == layers + head
    share = sparse.techniques[0].active_share
    assert share == pytest.approx(0.5, abs=0.08)
    assert read(model, sparse) == pytest.approx(share * layers + head)
