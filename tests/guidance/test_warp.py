"""The warps are those that transformers applies in generate."""

import pytest
import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hasten.guidance.text.warp import check_warp, warp


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_is_the_chain_of_transformers(dtype):
    logits, ids = 3 * torch.randn(4, 200, dtype=dtype), torch.randint(200, (4, 12))
    expected = logits.clone()
    for step in (
        RepetitionPenaltyLogitsProcessor(1.3),
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(50),
        TopPLogitsWarper(0.8),
    ):
        expected = step(ids, expected)
    seen = torch.zeros(4, 200, dtype=torch.bool).scatter(1, ids, True)
    warped = warp(logits, temperature=0.7, top_k=50, top_p=0.8, repetition_penalty=1.3, seen=seen)
    assert torch.equal(warped == -torch.inf, expected == -torch.inf) and (warped == -torch.inf).any()
    torch.testing.assert_close(warped, expected)


def test_nothing_is_changed_by_default():
    logits = torch.randn(2, 10)
    assert torch.equal(warp(logits), logits) and torch.equal(warp(logits, temperature=0.0), logits)


def test_at_least_one_token_stays():
    assert (warp(torch.randn(3, 10), top_p=1e-9) > -torch.inf).sum(-1).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 or more, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be 0 or more, got nan"),
        ({"top_k": 0}, "top_k must be 1 or more, or None, got 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, or None, got 0.0"),
        ({"top_p": 1.5}, "got 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0, got 0.0"),
    ],
)
def test_bad_settings(setting, message):
    defaults = {"temperature": 1.0, "top_k": None, "top_p": None, "repetition_penalty": 1.0}
    with pytest.raises(ValueError, match=message):
        check_warp(**(defaults | setting))


def test_a_penalty_needs_the_texts():
    with pytest.raises(ValueError, match=r"repetition_penalty 1.2 needs seen"):
        warp(torch.zeros(1, 3), repetition_penalty=1.2)
