"""The laws that every kind of constraint keeps, on random walks over a small vocabulary."""

import random

import numpy as np
import pytest
import walks

from hasten.guidance.text import bitmask
from hasten.guidance.text.constraints import (
    Choice,
    Constraint,
    Grammar,
    JsonSchema,
    OneOf,
    Predicate,
    Regex,
    Substring,
    UnsatisfiableError,
)
from hasten.guidance.text.vocabulary import Vocabulary

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True, "maxItems": 2}, "é": {}},
    "required": ["a"],
    "additionalProperties": False,
}
FILLING = {
    "schema": JsonSchema(SCHEMA),
    "schema of a grammar": JsonSchema({"type": "object", "properties": {"ab": {"type": "string"}}}),
    "schema of odd integers": JsonSchema({"type": "integer", "not": {"multipleOf": 2}}),
    "regex": Regex(r"(a+b|é+\d{1,3}|null)"),
    "lark": Grammar('start: "(" start ")" | /[a-c]+/ | "é"'),
    "ebnf": Grammar('root ::= "(" root ")" | [a-c]+'),
    "strings": OneOf(["a", "ab", "abé", "é", "éa", "null", "nul", "", "12"]),
    "corpus": Substring(["true é null aaaaaaaaaa", "12 ab é"]),
    "both": Regex("[ab]*") & OneOf(["ab", "a", "c"]),
    "three": OneOf(["12", "1", "a", "true"]) & JsonSchema({"type": ["integer", "boolean"]}) & Substring("12 true"),
}
ASKING = {
    "prefix": Predicate(lambda text: len(text) < 5),
    "boundary": Predicate(lambda text: len(text) < 5, on="boundary"),
    "complete": Predicate(lambda text: text in ("ab", "é"), on="complete"),
    "regex and predicate": Regex("[aé]*") & Predicate(lambda text: len(text) < 5),
}
EVERY = FILLING | ASKING
COMPLETE = {
    "schema": '{"a": [1, 12], "é": null}',
    "schema of a grammar": '{"ab":"é"}',
    "schema of odd integers": "121",
    "regex": "aab",
    "lark": "((é))",
    "ebnf": "(ab)",
    "strings": "abé",
    "corpus": "é null a",
    "both": "ab",
    "three": "12",
    "prefix": "é a\n",
    "boundary": "aa é",
    "complete": "ab",
    "regex and predicate": "aéaé",
}
VOCABULARY = walks.vocabulary()


def bind(name):
    return EVERY[name].bind(VOCABULARY)


def states(bound, seed, count=3, tokens=8):
    """States along random walks, each fresh, with the tokens that lead there."""
    draw = random.Random(seed)
    for _ in range(count):
        path, state = [], bound.start()
        for _ in range(tokens):
            yield path, bound.fork(state)
            valid = [t for t in walks.allowed(bound, state) if t not in (walks.EOS, walks.SECOND_EOS)]
            if not valid:
                break
            token = draw.choice(valid)
            path, state = [*path, token], bound.advance(state, token)


@pytest.mark.parametrize("name", EVERY)
def test_a_check_changes_nothing(name):
    bound = bind(name)
    for path, state in states(bound, 1):
        replayed = bound.start()
        for token in path:
            replayed = bound.advance(replayed, token)  # never checked on the way
        for _ in range(2):
            assert walks.allowed(bound, state) == walks.allowed(bound, replayed)
        assert bound.complete(state) == bound.complete(replayed)


@pytest.mark.parametrize("name", EVERY)
def test_forks_go_their_own_ways(name):
    bound = bind(name)
    for _, state in states(bound, 2, count=2):
        valid = [t for t in walks.allowed(bound, state) if t not in (walks.EOS, walks.SECOND_EOS)]
        before = walks.allowed(bound, state)
        for token in random.Random(3).sample(valid, min(3, len(valid))):
            alone = walks.allowed(bound, bound.advance(bound.fork(state), token))
            one, other = bound.fork(state), bound.fork(state)
            one = bound.advance(one, token)
            if len(valid) > 1:
                other = bound.advance(other, next(t for t in valid if t != token))
            assert walks.allowed(bound, one) == alone
            assert walks.allowed(bound, state) == before


@pytest.mark.parametrize("name", FILLING)
def test_the_mask_is_what_single_checks_accept(name):
    bound = bind(name)
    assert bound.can_fill_mask
    for _, state in states(bound, 4):
        assert walks.mask_of(bound, state) == walks.allowed(bound, state) == bound.allowed(state).tolist()


@pytest.mark.parametrize("name", ASKING)
def test_where_no_mask_can_be_filled_none_is(name):
    bound = bind(name)
    mask = np.full(20, 7, np.int32)
    assert not bound.can_fill_mask and not bound.fill_mask(bound.start(), mask) and (mask == 7).all()
    assert bound.allowed(bound.start()) is None


@pytest.mark.parametrize("name", EVERY)
def test_where_no_mask_can_be_filled_every_token_is_checked(name):
    bound = bind(name)
    for _, state in states(bound, 6, count=1):
        mask = np.full(bitmask.words(walks.LENGTH) + 1, -1, np.int32)
        assert bound.fill_mask_or_check(state, mask) == (0 if name in FILLING else walks.LENGTH)
        assert bitmask.members(mask, 32 * len(mask)).tolist() == walks.allowed(bound, state)


@pytest.mark.parametrize("name", EVERY)
def test_the_end_is_valid_where_the_text_is_complete(name):
    bound = bind(name)
    assert walks.accepts(bound, COMPLETE[name])
    for _, state in states(bound, 5):
        valid = walks.allowed(bound, state)
        assert (walks.EOS in valid) == (walks.SECOND_EOS in valid) == bound.complete(state)
        assert walks.SPECIAL not in valid and all(0 <= token < walks.LENGTH - 1 for token in valid)
        assert walks.allowed(bound, bound.advance(bound.fork(state), walks.EOS)) == valid


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("token", [-1, walks.SPECIAL, walks.LENGTH - 1, walks.LENGTH, 10**6])
def test_ids_that_are_no_text_cannot_be_advanced_over(name, token):
    bound = bind(name)
    with pytest.raises(ValueError, match=f"token {token}"):
        bound.advance(bound.start(), token)


@pytest.mark.parametrize("name", FILLING)
def test_an_invalid_token_cannot_be_advanced_over(name):
    bound = bind(name)
    with pytest.raises(ValueError, match="valid here"):
        bound.advance(bound.start(), ord("\\"))
    assert not bound.check(bound.start(), ord("\\"))


def test_a_conjunction_is_the_intersection():
    parts = [Regex("[ab]*|é"), OneOf(["ab", "a", "abab", "é", "c"]), Predicate(lambda text: text != "abab")]
    both = (parts[0] & parts[1] & parts[2]).bind(VOCABULARY)
    alone = [part.bind(VOCABULARY) for part in parts]
    for text in ("", "a", "ab", "aba", "abab", "é", "c", "b"):
        assert walks.accepts(both, text) == all(walks.accepts(part, text) for part in alone), text
    assert both.allowed_text(both.start()).endswith("and what a predicate accepts")


def test_a_conjunction_that_nothing_satisfies():
    with pytest.raises(UnsatisfiableError, match="conjunction"):
        (OneOf(["a"]) & OneOf(["b"])).bind(VOCABULARY)
    with pytest.raises(TypeError):
        OneOf(["a"]) & "b"


def test_what_is_allowed_in_words():
    bound = Choice(["ab", "abc"]).bind(VOCABULARY)
    state = bound.start()
    assert bound.allowed_text(state) == "'a', 'ab'"
    state = bound.advance(bound.advance(state, ord("a")), ord("b"))
    assert bound.allowed_text(state) == "'c', the end of the text"
    assert bound.allowed_text(bound.advance(state, ord("c"))) == "the end of the text"
    many = Regex("[a-z]").bind(VOCABULARY)
    assert many.allowed_text(many.start()).endswith("'l', 14 more")


@pytest.mark.parametrize(
    "mask",
    [np.zeros(3, np.int32), np.zeros(20, np.int64), np.zeros((1, 20), np.int32), np.zeros(40, np.int32)[::2]],
    ids=["short", "int64", "2-d", "strided"],
)
def test_a_mask_that_cannot_be_filled(mask):
    bound = OneOf(["a"]).bind(VOCABULARY)
    with pytest.raises(ValueError, match="mask_row must be contiguous int32"):
        bound.fill_mask(bound.start(), mask)


@pytest.mark.parametrize("name", ["schema", "regex", "lark", "strings", "corpus", "prefix"])
def test_characters_in_pieces_and_tokens_of_the_same_bytes(name):
    """Byte-fallback tokens: "é" as one token, as two bytes, and a second token of the same bytes."""
    tokens = [bytes([i]) for i in range(256)] + ["é".encode(), "é".encode(), b"</s>"]
    constraints = {
        "schema": JsonSchema({"const": "é"}),
        "regex": Regex('"é"'),
        "lark": Grammar('start: "\\"é\\""'),
        "strings": OneOf(['"é"']),
        "corpus": Substring('"é"') & Predicate(lambda text: not text or text[0] == '"'),
        "prefix": Predicate(lambda text: '"é"'.startswith(text)),
    }
    bound = constraints[name].bind(Vocabulary(tokens, eos=[258]))
    quote = ord('"')
    first, second = "é".encode()
    for path in ([quote, 256, quote], [quote, 257, quote], [quote, first, second, quote]):
        state = bound.start()
        for token in path:
            assert bound.check(state, token)
            state = bound.advance(state, token)
        assert bound.check(state, 258)
    state = bound.advance(bound.advance(bound.start(), quote), first)
    assert not bound.complete(state)
    assert [t for t in range(259) if bound.check(state, t)] == [second]


def test_a_text_that_the_vocabulary_cannot_end():
    bound = Regex("ab").bind(Vocabulary([b"a", b"</s>"], eos=[1]))
    state = bound.advance(bound.start(), 0)
    for _ in range(2):
        assert bound.allowed(state).tolist() == [] and bound.allowed_text(state) == "nothing"
        assert not bound.check(state, 0) and not bound.check(state, 1)


def test_what_a_text_stands_for():
    corpus = Substring(["ab 12", "12"])
    schema = JsonSchema({"type": ["integer", "null"]})
    assert schema.value("12") == 12 and schema.value("null") is None
    assert corpus.value("12") == corpus.places("12") == [(0, 3), (1, 0)]
    assert len(Substring("a" * 500).value("a")) == 100
    for constraint in (Regex("12"), Choice(["12"]), Grammar('start: "12"'), Predicate(str.isdigit), Constraint()):
        assert constraint.value("12") is None
    assert (Regex("[0-9]+") & schema & corpus).value("12") == 12
    assert (corpus & Choice(["12"]) & schema).value("12") == corpus.places("12")
    assert (Regex("12") & Choice(["12"])).value("12") is None


def test_unbound_constraints_have_no_language_of_their_own():
    with pytest.raises(NotImplementedError):
        Constraint().bind(VOCABULARY)
