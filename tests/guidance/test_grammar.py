"""Regular expressions as re.fullmatch decides, grammars over enumerated texts, and what is wrong with either."""

import itertools
import random
import re

import pytest
import walks

from hasten.guidance.text.constraints import Grammar, Regex, UnsatisfiableError

VOCABULARY = walks.vocabulary()

PATTERNS = [
    "", "a", "ab|", "a*b", "(a|b)+", "[ab]{2}", "a{1,2}b?", "a{2,}", "(?:a|é)b", "(?P<x>a)b", "[^a]", ".", "..", "a.b", "(?s)a.b", "(?i)aB",
    "(?i)É", r"\d+", r"\w\W", r"\s", r"\S?", "^a$", "^a|b$", r"\Aab\Z", r"\\Z", r"a\.b", "a/b", r"a\/b", '"a"', r"\"", "a\nb", "(a*)*", "a??b", "[a-b1-2]+",
    "[]a]", r"[\]a]", r"[\-a]+", r"\x61", r"\u00e9", "(a|ab)(b|)", "(|a)(|b)", "[^ab\n]b", r"\t|\n", "(a(b(1)?)?)?", "1{0}a", "ééé?",
]  # fmt: skip
LETTERS = 'abAB12é.\\Z/"\n\t -]'


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_regex_accepts_what_fullmatch_accepts(pattern):
    bound = Regex(pattern).bind(VOCABULARY)
    texts = ["", *LETTERS, *map("".join, itertools.product(LETTERS, repeat=2))]
    texts += map("".join, itertools.product("abé1", repeat=3))
    matching = [text for text in texts if re.fullmatch(pattern, text)]
    assert matching or pattern == "a/b" or len(pattern) > 2
    assert [text for text in texts if walks.accepts(bound, text)] == matching


@pytest.mark.parametrize("pattern", [*PATTERNS, r"[a-z]+@[a-z]+\.(org|com)", r"-?(0|[1-9]\d*)(\.\d+)?", r"([ab]{1,2} ){1,3}\w", "[\U0001f600-\U0001f64f]é"])  # fmt: skip
def test_every_generated_text_matches(pattern):
    bound, draw = Regex(pattern).bind(VOCABULARY), random.Random(0)
    texts = [walks.random_text(bound, draw) for _ in range(8)]
    assert any(text is not None for text in texts)
    for text in texts:
        assert text is None or re.fullmatch(pattern, text.decode()), text


def test_where_rust_accepts_more_than_re_the_text_cannot_end():
    for pattern, text in ((r"\w", "\u24d0"), (r"[^\s]", "\x1c")):
        assert re.fullmatch(pattern, text) is None and not walks.accepts(Regex(pattern).bind(VOCABULARY), text)


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("a(b", "position 1"),
        ("[a", "position 0"),
        ("*a", "position 0"),
        (r"(a)\1", "backreferences"),
        ("a(?=b)", "look-around"),
        ("(?<!a)b", "look-around"),
        ("[a-z&&b]", "position 4"),
        (3, "a pattern is a string, got int"),
        (b"a", "a pattern is a string, got bytes"),
        (re.compile("a"), "a pattern is a string, got Pattern"),
    ],
)
def test_a_wrong_regex_says_where_and_why(pattern, why):
    with pytest.raises(ValueError, match="regex") as refused:
        Regex(pattern).bind(VOCABULARY)
    assert why in str(refused.value) and repr(pattern) in str(refused.value)


@pytest.mark.parametrize("pattern", ["[^\x00-\U0010ffff]", r"[^\s\S]"])
def test_a_regex_that_nothing_matches(pattern):
    with pytest.raises(UnsatisfiableError, match="regex"):
        Regex(pattern).bind(VOCABULARY)


def balanced(text):
    depth = 0
    for letter in text:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth < 0:
            return False
    return depth == 0


@pytest.mark.parametrize(
    "grammar",
    ['start: item*\nitem: "(" start ")" | "a"', 'root ::= item*\nitem ::= "(" root ")" | [a]'],
    ids=["lark", "ebnf"],
)
def test_a_grammar_accepts_its_language(grammar):
    bound = Grammar(grammar).bind(VOCABULARY)
    for length in range(7):
        for text in map("".join, itertools.product("(a)", repeat=length)):
            assert walks.accepts(bound, text) == balanced(text), text


def test_every_generated_text_belongs_to_the_grammar():
    expression = r"""
        start: sum
        sum: product (("+" | "-") product)*
        product: atom (("*") atom)*
        atom: /[0-9]{1,3}/ | "(" sum ")"
    """
    bound, draw = Grammar(expression).bind(VOCABULARY), random.Random(1)
    texts = [walks.random_text(bound, draw) for _ in range(30)]
    assert sum(text is not None for text in texts) > 15
    for text in texts:
        if text is not None:
            eval(re.sub(rb"\b0+(?=\d)", b"", text))  # raises if it is no expression


@pytest.mark.parametrize(
    ("grammar", "why"),
    [
        ('start: "a"\nitem: (', "2(8)"),
        ('start: item\nitem: "a" ]\n', "2(11)"),
        ("start: item\nitem: other", '2(7): unknown name: "other"'),
        ('item: "a"', "line 1"),
        ("root ::= (", "line 1"),
        ('%llguidance {"no_forcing": false}\nstart: "a"', "options"),
        (3, "string"),
    ],
)
def test_a_wrong_grammar_says_where_and_why(grammar, why):
    with pytest.raises(ValueError, match="grammar") as refused:
        Grammar(grammar).bind(VOCABULARY)
    assert why in str(refused.value)


def test_a_matcher_that_broke_is_not_believed():
    bound = Grammar('start: "ab"').bind(VOCABULARY)
    state = bound.start()
    state.consume_token(ord("x"))  # what a limit of llguidance does in the middle of a text
    for ask in (bound.check, bound.advance):
        with pytest.raises(RuntimeError, match="grammar: "):
            ask(state, ord("a"))
    with pytest.raises(RuntimeError, match="grammar: "):
        bound.allowed(state)
