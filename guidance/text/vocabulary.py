"""The bytes that each token of a tokenizer stands for."""

from collections.abc import Sequence
from functools import cached_property

from llguidance import LLTokenizer, TokenizerWrapper

NEVER_UTF8 = frozenset(b"\xc0\xc1" + bytes(range(0xF5, 0x100)))  # RFC 3629: no UTF-8 text holds one of these bytes


class Vocabulary:
    """What constraints know of a tokenizer.

    Args:
        tokens: the bytes of each token id, as they stand in the text: " the" and not "Ġthe", one byte for a
            byte-fallback token, b"" for an id without a token.
        eos: the ids that end a generation, at least one.
        special: the ids of control tokens. They are never text, and neither are those of `eos`.

    Raises:
        ValueError: no EOS id, or an id outside the tokens.
    """

    def __init__(self, tokens: Sequence[bytes], eos: Sequence[int], special: Sequence[int] | frozenset[int] = ()):
        self.tokens = list(tokens)
        self.eos = tuple(eos)
        self.special = frozenset(special) | frozenset(self.eos)
        if not self.eos:
            raise ValueError("eos is empty: a constraint needs a token to end the text with")
        for name, ids in (("eos", self.eos), ("special", self.special)):
            for token in sorted(ids):
                if not 0 <= token < len(self.tokens):
                    raise ValueError(f"{name} holds token id {token}, the vocabulary is 0..{len(self.tokens) - 1}")

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def texts(self) -> list[bytes | None]:
        """The bytes of each id; None for what is never text: special, EOS, empty, or with a byte that UTF-8 has not."""
        return [
            None if token in self.special or not text or NEVER_UTF8.intersection(text) else bytes(text)
            for token, text in enumerate(self.tokens)
        ]

    @cached_property
    def by_text(self) -> tuple[list[bytes], list[list[int]]]:
        """The distinct bytes of tokens in ascending order, and for each the ids that stand for it."""
        ids: dict[bytes, list[int]] = {}
        for token, text in enumerate(self.texts):
            if text is not None:
                ids.setdefault(text, []).append(token)
        texts = sorted(ids)
        return texts, [ids[text] for text in texts]

    @cached_property
    def longest(self) -> int:
        """The number of bytes of the longest token that can be part of a text."""
        return max((len(text) for text in self.texts if text), default=0)

    @cached_property
    def llguidance(self) -> LLTokenizer:
        """The tokenizer object of llguidance. Ids that are never text have no bytes there, and are never taken."""
        return LLTokenizer(TokenizerWrapper(_Tokens(self)), n_vocab=len(self), eos_token=[self.eos[0]])


# Every byte is a token, and 256 is EOS: a constraint over it can be asked about any text, however tokens would cut it.
BYTES = Vocabulary([*(bytes([byte]) for byte in range(256)), b""], eos=(256,))


class _Tokens:
    """What llguidance's TokenizerWrapper asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary):
        self.eos_token_id = vocabulary.eos[0]
        self.tokens = [text or b"" for text in vocabulary.texts]
        self.special_token_ids = sorted(vocabulary.special)

    def __call__(self, text: bytes) -> list[int]:
        """llguidance tokenizes only what a grammar forces; every grammar here is compiled with no_forcing."""
        return []
