"""Python functions as constraints: when they are asked, with which text, and what becomes of their errors."""

import pytest
import walks

from hasten.guidance.text.constraints import (
    InconsistentPredicateError,
    Predicate,
    PredicateError,
    Regex,
    UnsatisfiableError,
)
from hasten.guidance.text.vocabulary import Vocabulary

VOCABULARY = walks.vocabulary()


def go(bound, text):
    state = bound.start()
    for byte in text.encode() if isinstance(text, str) else text:
        assert bound.check(state, byte), text
        state = bound.advance(state, byte)
    return state


class Asked:
    """A function that keeps what it was asked."""

    def __init__(self, answer=lambda text: True):
        self.texts, self.answer = [], answer

    def __call__(self, text):
        self.texts.append(text)
        return self.answer(text)


@pytest.mark.parametrize(
    ("on", "expected"),
    [
        ("prefix", ["", "a", "aé", "aé ", "aé  ", "aé  b"]),
        ("boundary", ["aé", "aé  b"]),
        ("complete", ["aé  b"]),
    ],
)
def test_when_a_predicate_is_asked(on, expected):
    asked = Asked()
    bound = Predicate(asked, on=on).bind(VOCABULARY)
    state = go(bound, "aé  b")
    assert bound.check(state, walks.EOS)
    assert asked.texts == expected


def test_boundaries_within_one_token():
    asked = Asked()
    vocabulary = Vocabulary([b"a b c", b" d", b"e", b"</s>"], eos=[3])
    bound = Predicate(asked, on="boundary").bind(vocabulary)
    state = bound.start()
    for token in (0, 1, 2):
        assert bound.check(state, token)
        state = bound.advance(state, token)
    assert asked.texts == ["a", "a b", "a b c"]
    assert bound.complete(state) and asked.texts[-1] == "a b c de"


@pytest.mark.parametrize("on", ["prefix", "boundary", "complete"])
def test_a_text_is_refused_where_the_predicate_refuses_it(on):
    bound = Predicate(lambda text: "b" not in text, on=on).bind(VOCABULARY)
    state = go(bound, "a")
    assert bound.check(state, ord("b")) == (on != "prefix")
    if on != "prefix":
        state = bound.advance(state, ord("b"))
        assert bound.check(state, ord(" ")) == (on == "complete")
        assert not bound.check(state, walks.EOS)


def test_an_answer_is_remembered():
    asked = Asked()
    bound = Predicate(asked).bind(VOCABULARY)
    for _ in range(3):
        state = go(bound, "ab")
        bound.check(state, walks.EOS)
    assert asked.texts == ["", "a", "ab"]


def test_characters_that_are_not_all_there_are_not_shown():
    asked = Asked()
    bound = Predicate(asked).bind(VOCABULARY)
    first, second = "é".encode()
    state = go(bound, bytes([ord("a"), first]))
    assert asked.texts == ["", "a"] and not bound.complete(state)
    assert not bound.check(state, ord("b")) and not bound.check(state, first)
    assert bound.check(state, second) and asked.texts[-1] == "aé"
    with pytest.raises(ValueError, match="makes no UTF-8"):
        bound.advance(state, ord("b"))


@pytest.mark.parametrize("on", ["prefix", "boundary", "complete"])
def test_a_predicate_that_raises_shows_its_own_error_and_the_text(on):
    def divides(text):
        return 1 / (5 - len(text)) > 0

    bound = Predicate(divides, on=on).bind(VOCABULARY)
    with pytest.raises(PredicateError, match=r"divides raised ZeroDivisionError for the text 'abcde'") as raised:
        state = go(bound, "abcde")
        bound.check(state, ord(" "))
        bound.check(state, walks.EOS)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    assert raised.traceback  # its frames are behind the cause
    assert raised.value.__cause__.__traceback__.tb_next.tb_frame.f_code.co_name == "divides"


def test_an_answer_that_contradicts_another_one_is_seen():
    bound = Predicate(lambda text: text != "a").bind(Vocabulary([b"a", b"ab", b"</s>"], eos=[2]))
    start = bound.start()
    assert bound.check(start, 1)
    assert not bound.check(start, 0)
    with pytest.raises(InconsistentPredicateError, match="refuses 'a' and accepts 'ab'"):
        bound.check(start, 1)


def test_at_the_end_alone_a_predicate_may_refuse_what_it_accepts_later():
    bound = Predicate(lambda text: len(text) == 2, on="complete").bind(VOCABULARY)
    assert [walks.accepts(bound, text) for text in ("", "a", "ab", "abc")] == [False, False, True, False]


@pytest.mark.parametrize("answer", [None, 1, "yes"])
def test_an_answer_that_is_no_bool(answer):
    with pytest.raises(TypeError, match=f"must return a bool, got {answer!r} for the text ''"):
        Predicate(lambda text: answer).bind(VOCABULARY)


def test_a_predicate_that_refuses_everything():
    with pytest.raises(UnsatisfiableError, match="refuses the empty text"):
        Predicate(lambda text: False).bind(VOCABULARY)


@pytest.mark.parametrize(("arguments", "message"), [((len, "end"), "on='end'"), (("len",), "'len'")])
def test_no_predicate(arguments, message):
    with pytest.raises(ValueError, match=message):
        Predicate(*arguments)


def test_a_predicate_is_asked_only_for_what_a_grammar_accepts():
    asked = Asked()
    bound = (Predicate(asked) & Regex("[ab]{2}")).bind(VOCABULARY)
    assert walks.accepts(bound, "ab") and not bound.check(bound.start(), ord("c"))
    assert asked.texts == ["", "a", "ab"]
