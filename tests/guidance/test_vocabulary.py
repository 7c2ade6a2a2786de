"""The bytes of tokens: which ids are text, and which are refused."""

import pytest

from hasten.guidance.text.vocabulary import Vocabulary


def test_ids_that_are_text():
    vocabulary = Vocabulary([b"a", b"</s>", b"<s>", b"", b"\xc3", b"\xff", b"a", "é".encode()], eos=[1], special=[2])
    assert vocabulary.texts == [b"a", None, None, None, b"\xc3", None, b"a", "é".encode()]
    assert vocabulary.by_text == ([b"a", b"\xc3", "é".encode()], [[0, 6], [4], [7]])
    assert vocabulary.special == {1, 2} and len(vocabulary) == 8


@pytest.mark.parametrize(
    ("eos", "special", "message"),
    [([], [], "eos is empty"), ([2], [], "eos holds token id 2"), ([0], [-1], "special holds token id -1")],
)
def test_ids_outside_the_vocabulary(eos, special, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary([b"</s>", b"a"], eos=eos, special=special)
