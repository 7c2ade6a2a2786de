"""One type of each make-up goes through the sweep's checks: accelerated, run beside the untouched model, reverted."""

import pytest
import torch

import hasten
from hasten.bench.runtime import sweep, tiny_zoo
from hasten.errors import UnsupportedModelError

SAMPLE = {
    "separate projections": ("causal", "llama"),
    "fused projections": ("causal", "phi3"),
    "Conv1D": ("causal", "gpt2"),
    "alibi": ("causal", "bloom"),
    "an encoder as decoder": ("causal", "bert"),
    "experts": ("causal", "mixtral"),
    "experts with biases, interleaved": ("causal", "gpt_oss"),
    "shared experts and latent attention": ("causal", "deepseek_v3"),
    "experts, each over every token": ("causal", "llama4_text"),
    "recurrent": ("causal", "mamba2"),
    "recurrent and attention": ("causal", "bamba"),
    "recurrent, attention and experts": ("causal", "qwen3_next"),
    "convolutions": ("causal", "lfm2"),
    "encoder-decoder": ("encoder-decoder", "t5"),
    "speech": ("speech", "whisper"),
    "pictures as tokens": ("image-text", "llava"),
    "positions on three axes": ("image-text", "qwen2_vl"),
    "cross-attention to pictures": ("image-text", "mllama"),
    "an inner language model": ("image-text", "blip-2"),
    "pictures in every step": ("image-text", "idefics"),
}
IMAGES_AS_TOKENS = ("llava", "qwen2_vl")
LINEAR_ATTENTION = ("mamba2", "bamba", "qwen3_next", "lfm2")


@pytest.mark.parametrize("name", SAMPLE)
def test_every_make_up(name):
    kind, model_type = SAMPLE[name]
    outcomes = sweep.attempt(kind, model_type).outcomes
    fast, pruned = outcomes.pop("FastLinearAttention"), outcomes.pop("VisionTokens", None)
    assert (fast.outcome == "works") == (model_type in LINEAR_ATTENTION) and fast.outcome in ("works", "refused"), fast
    if kind == "image-text":
        assert pruned.outcome == ("works" if model_type in IMAGES_AS_TOKENS else "refused"), pruned
    else:
        assert pruned is None
    assert {technique: outcome.outcome for technique, outcome in outcomes.items()} == dict.fromkeys(
        outcomes, "works"
    ), outcomes
    assert all(outcome.changed > outcome.called / 2 for outcome in outcomes.values())


def attempt_with(monkeypatch, accelerate, revert=hasten.revert) -> dict[str, sweep.Outcome]:
    """The outcomes on Llama with other functions in the place of hasten's."""
    monkeypatch.setattr(sweep.hasten, "accelerate", accelerate, raising=False)
    monkeypatch.setattr(sweep.hasten, "revert", revert, raising=False)
    return sweep.attempt("causal", "llama").outcomes


def nothing(model, *_, **__):
    pass


def scaled(model, factor: float) -> None:
    """Changes the predictions of `model`."""
    with torch.no_grad():
        model.lm_head.weight.mul_(factor)


def marked(model, *_, **__) -> None:
    """Gives a layer a forward of its own that does what its class does."""
    layer = model.model.layers[0]
    layer.forward = type(layer).forward.__get__(layer)


def unmarked(model) -> None:
    del model.model.layers[0].forward


@pytest.mark.parametrize(
    ("accelerate", "revert", "outcome", "detail"),
    [
        (nothing, nothing, "silent", "nothing was changed"),
        (lambda m, *_, **__: (marked(m), scaled(m, 1.001)), nothing, "silent", "logits are 0.001 from"),
        (marked, nothing, "silent", "model.layers.0 is another module"),
        (marked, lambda m: (unmarked(m), scaled(m, 1.5)), "silent", "lm_head.weight has other values"),
        (marked, lambda m: (unmarked(m), m.requires_grad_(False)), "silent", "model.embed_tokens.weight is"),
        (marked, unmarked, "works", ""),
    ],
    ids=["nothing", "wrong", "not reverted", "other values", "other flags", "right"],
)  # fmt: skip
def test_the_sweep_sees_what_is_wrong(accelerate, revert, outcome, detail, monkeypatch):
    found = attempt_with(monkeypatch, accelerate, revert)["DenseDecode"]
    assert found.outcome == outcome and detail in found.detail


def test_the_sweep_tells_refusals_from_errors(monkeypatch):
    def refuse(model, *_, **__):
        raise UnsupportedModelError("model.layers.0", "Layer", "it cannot be", "take another")

    def refuse_half_way(model, *_, **__):
        marked(model)
        refuse(model)

    def fail(model, *_, **__):
        raise TypeError("unsupported operand\nmore lines")

    assert attempt_with(monkeypatch, refuse)["Wina"] == sweep.Outcome("refused", "Layer: it cannot be")
    assert attempt_with(monkeypatch, refuse_half_way)["Wina"].outcome == "silent"
    assert attempt_with(monkeypatch, fail)["Wina"] == sweep.Outcome("error", "TypeError: unsupported operand")


def test_wina_that_never_skips_is_seen(monkeypatch):
    assert "untouched model's" in attempt_with(monkeypatch, marked, unmarked)["Wina"].detail


def test_a_worker_that_dies_is_recorded_and_the_next_type_goes_on():
    dead, unbuilt = sweep.sweep([("causal", "no such type"), ("image-text", "gemma3n")], workers=1)
    assert {outcome["outcome"] for outcome in dead["outcomes"].values()} == {"error"}
    assert "ended with exit status 1" in dead["outcomes"]["Wina"]["detail"]
    assert unbuilt["unbuilt"] == tiny_zoo.TIMM


def test_summary_counts_every_type_once_in_its_make_up_and_once_in_all():
    outcomes = {name: {"outcome": "works", "detail": ""} for name in sweep.TECHNIQUES}
    refused = {name: {"outcome": "refused", "detail": "Model: it is 'that'"} for name in sweep.TECHNIQUES}
    records = [
        {"kind": "causal", "model_type": name, "made_up": made_up, "unbuilt": "", "outcomes": found}
        for name, made_up, found in (("b", "dense", outcomes), ("a", "dense", outcomes), ("c", "hybrid", refused))
    ]
    _, rows = sweep.summary(records)
    assert [row[3:] for row in rows if row[2] == "Wina"] == [
        ("2", "2", "0", "0", "0"),
        ("1", "0", "1", "0", "0"),
        ("3", "2", "1", "0", "0"),
    ]
    assert sweep.types_by_outcome(records, "Wina") == ["works: a, b", "refused (it is '...'): c"]
