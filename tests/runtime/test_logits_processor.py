"""Masks inside transformers' own generate."""

import re

import pytest
import torch
from toy_language import EOS, toy

from hasten.generation.generation import generate
from hasten.generation.logits_processor import ConstraintLogitsProcessor
from hasten.guidance.text.constraints import Predicate, Regex

PATTERN = "b[acd]{1,6}e|cc"


def continued(processor, prompts, **settings):
    model, tokenizer = toy()
    inputs = tokenizer(prompts, return_tensors="pt", return_token_type_ids=False)
    rows = model.generate(**inputs, logits_processor=[processor], max_new_tokens=12, pad_token_id=EOS, **settings)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows[:, inputs["input_ids"].shape[1] :]]


@pytest.mark.parametrize(
    "settings",
    [{"do_sample": False}, {"do_sample": True, "num_return_sequences": 20}, {"num_beams": 3, "do_sample": False}],
    ids=["greedy", "sampling", "beams"],
)
def test_every_text_satisfies_the_constraint(settings):
    model, tokenizer = toy()
    processor = ConstraintLogitsProcessor(Regex(PATTERN), tokenizer, model)
    texts = continued(processor, ["abc", "dea"], **settings)
    assert all(re.fullmatch(PATTERN, text) for text in texts)
    assert continued(processor, ["dea"], do_sample=False) == continued(
        ConstraintLogitsProcessor(Regex(PATTERN), tokenizer, model), ["dea"], do_sample=False
    )


def test_greedy_is_that_of_hasten_generate():
    model, tokenizer = toy()
    for constraint in (Regex(PATTERN), Predicate(lambda text: text in "bcbc")):
        (text,) = continued(ConstraintLogitsProcessor(constraint, tokenizer, model), ["abc"], do_sample=False)
        settings = {"constraint": constraint, "temperature": 0, "max_new_tokens": 12}
        assert text == generate(model, tokenizer, "abc", on_dead="return", **settings).text


def test_scores_are_masked_as_the_constraint_says():
    model, tokenizer = toy()
    processor = ConstraintLogitsProcessor(Regex("ab?"), tokenizer, model)
    scores = torch.randn(1, 9)
    for ids, allowed in (([1, 2], [0]), ([1, 2, 0], [1, EOS, EOS + 1]), ([1, 2, 0, 1], [EOS, EOS + 1])):
        masked = processor(torch.tensor([ids]), scores)
        assert masked.isfinite()[0].nonzero()[:, 0].tolist() == allowed
        assert torch.equal(masked[:, allowed], scores[:, allowed])


def test_a_call_on_what_the_call_before_gave_goes_on():
    model, tokenizer = toy()
    processor = ConstraintLogitsProcessor(Regex("ab[cd]e"), tokenizer, model)
    settings = {"logits_processor": [processor], "do_sample": False, "pad_token_id": EOS}
    rows = model.generate(torch.tensor([[0, 1]]), max_new_tokens=2, **settings)
    longer = model.generate(rows, max_new_tokens=9, **settings)
    assert re.fullmatch("abab[cd]e", tokenizer.decode(longer[0], skip_special_tokens=True))
    again = model.generate(torch.tensor([[2, 3]]), max_new_tokens=2, **settings)
    assert tokenizer.decode(again[0]) == "cdab"


def test_a_dead_end_is_an_error():
    model, tokenizer = toy()
    constraint = Predicate(lambda text: text in ("", "a"), on="prefix") & Predicate(
        lambda text: text == "b", on="complete"
    )
    processor = ConstraintLogitsProcessor(constraint, tokenizer, model)
    with pytest.raises(ValueError, match="dead end: the constraint allows what a predicate accepts"):
        continued(processor, ["abc"], do_sample=False)
