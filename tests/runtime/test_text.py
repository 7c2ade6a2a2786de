"""Stop strings and streams over text that comes in pieces cut anywhere."""

import random

import pytest

from hasten.generation.text import BYTES, Printer, Stops, holds
from hasten.guidance.text.constraints import JsonSchema, Predicate, Regex


def pieces(text, generator):
    """The text, cut at random."""
    while text:
        length = generator.randint(1, 4)
        yield text[:length]
        text = text[length:]


@pytest.mark.parametrize("strings", [("aab",), ("aba", "bb"), ("é",), ()], ids=str)
def test_a_stop_string_is_found_where_it_is_and_nothing_of_it_is_printed(strings):
    generator = random.Random(0)
    for _ in range(300):
        whole = "".join(generator.choice("abé") for _ in range(12))
        expected = min((whole.find(string) for string in strings if string in whole), default=None)
        stops, printer, text, printed, place = Stops(strings), Printer(), b"", "", None
        for piece in pieces(whole.encode(), generator):
            known, text = len(text), text + piece
            place = stops.find(text, known)
            if place is not None:
                text = text[:place]
                break
            printed += printer.print(text, stops.certain(text))
            assert len(text) - stops.certain(text) < max([1, *(len(string.encode()) for string in strings)])
        printed += printer.print(text, len(text), final=True)
        assert printed == text.decode() == whole[:expected]
        assert (place is None) == (expected is None)


def test_an_unfinished_character_is_printed_when_it_is_finished():
    printer = Printer()
    text = "a🙂b".encode()
    assert [printer.print(text[:end], end) for end in range(1, 7)] == ["a", "", "", "", "🙂", "b"]
    printer = Printer()
    assert printer.print(text[:3], 3) + printer.print(text[:3], 3, final=True) == "a\ufffd"


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
