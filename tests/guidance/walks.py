"""Walks of a constraint over a small vocabulary: every byte, longer tokens (one twice), two EOS, a special, padding."""

import random

import numpy as np

from hasten.guidance.text import bitmask
from hasten.guidance.text.vocabulary import Vocabulary

LONGER = ['"a', '":', '": ', '", "', '"}', '"]', '}, {', "],", "12", "0.", "true", "null", "é", "é".encode()[1:] + b"a", "ab", "ab", "a" * 9, ", "]  # fmt: skip
EOS, SECOND_EOS, SPECIAL = 256, 257, 258
LENGTH = 259 + len(LONGER) + 1  # the last id is padding


def vocabulary() -> Vocabulary:
    """The ids of single bytes are the bytes themselves."""
    longer = [text if isinstance(text, bytes) else text.encode() for text in LONGER]
    tokens = [*(bytes([i]) for i in range(256)), b"</s>", b"<eot>", b"<tool>", *longer, b""]
    return Vocabulary(tokens, eos=[EOS, SECOND_EOS], special=[SPECIAL])


def accepts(bound, text: str | bytes) -> bool:
    """Whether the constraint lets a text through byte by byte and lets it end there."""
    state = bound.start()
    for byte in text.encode() if isinstance(text, str) else text:
        if not bound.check(state, byte):
            return False
        state = bound.advance(state, byte)
    return bound.check(state, EOS)


def allowed(bound, state) -> list[int]:
    """The valid tokens as single checks find them, also outside the vocabulary."""
    return [token for token in range(-1, LENGTH + 2) if bound.check(state, token)]


def random_text(bound, draw: random.Random, tokens: int = 40) -> bytes | None:
    """A complete text of random valid tokens, rather short ones; None where none was found."""
    state, text = bound.start(), b""
    for _ in range(tokens):
        valid = bound.allowed(state).tolist()
        if not valid:
            return None
        ending = [token for token in valid if token in (EOS, SECOND_EOS)]
        if ending and draw.random() < 0.4:
            return text
        going_on = [token for token in valid if token not in (EOS, SECOND_EOS)]
        if not going_on:
            return text
        closing = [token for token in going_on if bound.vocabulary.tokens[token][-1:] in b'"]}']
        token = draw.choice(closing if closing and draw.random() < 0.5 else going_on)
        text += bound.vocabulary.tokens[token]
        state = bound.advance(state, token)
    return None


def mask_of(bound, state) -> list[int]:
    """The valid tokens as the mask has them; words that are not the vocabulary's stay clear."""
    mask = np.full(bitmask.words(LENGTH) + 2, -1, np.int32)
    assert bound.fill_mask(state, mask)
    return bitmask.members(mask, 32 * len(mask)).tolist()
