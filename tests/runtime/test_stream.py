"""Streams of text that comes in pieces cut anywhere: nothing that is printed is taken back."""

import random

import pytest

from hasten.generation.stream import Printer
from hasten.guidance.text.stops import Stops


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
