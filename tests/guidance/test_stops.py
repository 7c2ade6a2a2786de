"""Where a text begins and ends: stop strings over bytes, whole texts, and the marker before a constraint."""

import pytest
import walks

from hasten.guidance.text.constraints import JsonSchema, Predicate, Regex
from hasten.guidance.text.stops import After, Stops, holds
from hasten.guidance.text.vocabulary import BYTES

VOCABULARY = walks.vocabulary()


def test_the_first_stop_string_is_found_across_the_border_of_two_pieces():
    stops = Stops(("bcd", "ée"))
    text = "abcdée".encode()
    assert stops.find(text, 0) == 1 and stops.find(text[:4], 3) == 1 and stops.find(text[:3], 0) is None
    assert stops.find(text, 4) == 4 and stops.find(text, 5) == 4  # what is known to hold none is not searched again
    assert Stops(()).find(text, 0) is None and Stops(()).certain(text) == len(text)


def test_what_may_become_a_stop_string_is_not_certain():
    stops = Stops(("bcd", "ée"))
    lengths = [stops.certain(text) for text in (b"", b"a", b"ab", b"abc", b"abca", "aé".encode(), "é".encode()[:1])]
    assert lengths == [0, 1, 1, 1, 4, 1, 0]


@pytest.mark.parametrize("strings", [("a", ""), (5,)], ids=str)
def test_stop_strings_that_are_none(strings):
    with pytest.raises(ValueError, match="stop must be strings that are not empty, got"):
        Stops(strings)


@pytest.mark.parametrize(
    ("constraint", "good", "bad"),
    [
        (Regex("é+x"), ["éx", "ééx"], ["x", "é", "éxx"]),
        (JsonSchema({"enum": [1, "ü"]}), ["1", '"ü"'], ["", "2", '"ü']),
        (Predicate(lambda text: len(text) == 2, on="complete"), ["é🙂"], ["é", ""]),
    ],
    ids=["regex", "json", "predicate"],
)
def test_whether_a_whole_text_satisfies_a_constraint(constraint, good, bad):
    bound = constraint.bind(BYTES)
    assert all(holds(bound, text.encode()) for text in good)
    assert not any(holds(bound, text.encode()) for text in bad)


@pytest.mark.parametrize(
    "constraint", [Regex("[ab]b"), Predicate(lambda text: text in ("", "a", "ab"))], ids=["regex", "predicate"]
)
def test_a_constraint_begins_after_its_marker(constraint):
    """Before it anything may come but EOS, tokens that are no text too; after it the states are the constraint's
    own."""
    bound = After(constraint.bind(VOCABULARY), "12a")
    state = bound.start()
    for token in (walks.SPECIAL, ord("1"), walks.LONGER.index("12") + 259, ord("a")):
        everything = [token for token in range(walks.LENGTH) if token not in (walks.EOS, walks.SECOND_EOS)]
        assert walks.mask_of(bound, state)[: len(everything)] == everything and not bound.complete(state)
        assert [token for token in range(walks.LENGTH) if bound.check(state, token)] == everything
        assert bound.allowed_text(state) == "anything up to '12a'"
        state = bound.advance(bound.fork(state), token)
    alone = constraint.bind(VOCABULARY)
    for text in (b"", b"a", b"ab"):
        own = alone.start()
        moved = bound.fork(state)
        for byte in text:
            own, moved = alone.advance(own, byte), bound.advance(moved, byte)
        assert walks.allowed(bound, moved) == walks.allowed(alone, own)
        assert bound.complete(moved) == alone.complete(own) and bound.allowed_text(moved) == alone.allowed_text(own)
