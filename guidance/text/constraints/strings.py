"""Text from a given set of strings, or out of a given corpus: sorted texts, searched by bisection.

Both kinds keep one block of bytes and the places in it where texts begin, sorted by what follows there. A prefix is a
range of these places, and a token narrows the range by bisection, whatever the tokenization. GENRE (De Cao et al. 2021)
generates entity names so, with a trie of tokens, and SEAL (Bevilacqua et al. 2022) n-grams of a corpus, with an
FM-index; bytes instead of tokens make an index independent of the tokenizer.
"""

from __future__ import annotations

import json
import mmap
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from hasten.guidance.text import bitmask
from hasten.guidance.text.constraints.base import BoundConstraint, Constraint, UnsatisfiableError
from hasten.guidance.text.vocabulary import Vocabulary
from hasten.kernels.suffix_array import suffix_array

END = b"\xff"  # behind every string and document; no UTF-8 text holds it, and it sorts last
VERSION = 1
LONGEST = 2**31 - 1
SHOWN_PLACES = 100
FILES = {"texts": "texts.bin", "begins": "begins.bin"}


class Place(NamedTuple):
    """Where a text occurs: `corpus[document].encode()[offset:]` begins with it."""

    document: int
    offset: int


class _SortedTexts(Constraint):
    """An index of texts.

    texts: bytes, or a memory map of a file. begins: a memoryview of "i" or "q" with places in it, sorted by the bytes
    that follow.
    """

    def __init__(self, texts: bytes | mmap.mmap, begins: memoryview):
        self._texts, self._begins = texts, begins

    def save(self, folder: str | PathLike) -> None:
        """Writes the index into a folder, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (("texts", self._texts), ("begins", self._begins)):
            written = folder / f"{FILES[name]}.new"  # not in place: this index may be mapped from that very file
            written.write_bytes(memoryview(content))
            written.replace(folder / FILES[name])
        about = {
            "kind": type(self).__name__,
            "version": VERSION,
            "texts": len(self._texts),
            "begins": len(self._begins),
            "integer": self._begins.format,
        }
        (folder / "index.json").write_text(json.dumps(about))

    @classmethod
    def load(cls, folder: str | PathLike):
        """An index that `save` wrote. Its files are mapped into memory and read when they are needed.

        Raises:
            ValueError: no index of this kind and version, or its files are cut off.
        """
        folder = Path(folder)
        try:
            about = json.loads((folder / "index.json").read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} holds no index: {error}") from error
        about = about if isinstance(about, dict) else {}
        if (
            about.get("kind") != cls.__name__
            or about.get("version") != VERSION
            or about.get("integer") not in ("i", "q")
            or not all(isinstance(about.get(name), int) for name in FILES)
        ):
            raise ValueError(
                f"{folder}: expected a {cls.__name__} index of version {VERSION}, "
                f"got {about.get('kind')} of version {about.get('version')}"
            )
        sizes = {"texts": about["texts"], "begins": about["begins"] * np.dtype(about["integer"]).itemsize}
        maps = {}
        for name, size in sizes.items():
            try:
                with open(folder / FILES[name], "rb") as file:
                    found = file.seek(0, 2)
                    if found != size:
                        raise ValueError(f"{folder / FILES[name]}: expected {size} bytes, got {found}")
                    maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:
                raise ValueError(f"{folder} holds no whole index: {error}") from error
        index = cls.__new__(cls)
        _SortedTexts.__init__(index, maps["texts"], memoryview(maps["begins"]).cast(about["integer"]))
        return index

    @property
    def nbytes(self) -> int:
        """The size of the index in bytes, in memory or on disk."""
        return len(self._texts) + self._begins.nbytes

    def bind(self, vocabulary: Vocabulary) -> BoundConstraint:
        return _BoundTexts(self, vocabulary)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(<{len(self._begins)} texts>)"

    def _first(self, text: bytes, low: int, high: int, depth: int) -> int:
        """The first of the places low..high - 1 whose bytes from `depth` on do not sort before the text, or high."""
        texts, end = self._texts, depth + len(text)
        return bisect_left(self._begins, text, low, high, key=lambda place: texts[place + depth : place + end])

    def _past(self, text: bytes, low: int, high: int, depth: int) -> int:
        """The first of the places low..high - 1 whose bytes from `depth` on sort after all that begins so, or high."""
        texts, end = self._texts, depth + len(text)
        return bisect_right(self._begins, text, low, high, key=lambda place: texts[place + depth : place + end])

    def _at(self, place: int, depth: int, length: int) -> bytes:
        begin = self._begins[place] + depth
        return self._texts[begin : begin + length]

    def _complete(self, low: int, high: int, depth: int) -> bool:
        raise NotImplementedError


class OneOf(_SortedTexts):
    """The text is one of the strings: names of entities, labels, answers; a handful, or millions.

    Args:
        strings: at least one; duplicates count once. `save` writes the index of them to a folder, `OneOf.load` maps it
            from there.

    Raises:
        ValueError: no strings, one string instead of several, or something that is no string of UTF-8.
    """

    def __init__(self, strings: Iterable[str]):
        if isinstance(strings, (str, bytes)):
            raise ValueError(f"strings: expected several strings, got one: {strings!r:.60}")
        if not isinstance(strings, Iterable):
            raise ValueError(f"strings: expected strings, got {strings!r:.60}")
        texts = sorted({_encode(string, "strings") + END for string in strings})
        if not texts:
            raise UnsatisfiableError("strings is empty: no text is one of no strings")
        ends = np.cumsum([len(text) for text in texts])
        begins = np.concatenate([[0], ends[:-1]]).astype(np.int32 if ends[-1] <= LONGEST else np.int64)
        super().__init__(b"".join(texts), memoryview(begins))

    def __len__(self) -> int:
        return len(self._begins)

    def _complete(self, low, high, depth):
        return self._at(high - 1, depth, 1) == END


Choice = OneOf  # the usual name where there is a handful


class Substring(_SortedTexts):
    """The text occurs verbatim in a corpus: quotations, evidence, code that exists.

    Args:
        corpus: a text, or documents, whose borders no text crosses. Less than 2 GiB of UTF-8. Building the index takes
            12 bytes of memory for every byte of text; `save` writes it to a folder, `Substring.load` maps it.

    Raises:
        ValueError: an empty or too long corpus, or something that is no string of UTF-8.
    """

    def __init__(self, corpus: str | Sequence[str]):
        documents = corpus if isinstance(corpus, Iterable) and not isinstance(corpus, str) else [corpus]
        texts = b"".join(_encode(document, "corpus") + END for document in documents)
        if len(texts) > LONGEST:
            raise ValueError(
                f"corpus: expected less than {LONGEST + 1} bytes with one more per document, got {len(texts)}"
            )
        bytes_ = np.frombuffer(texts, np.uint8)
        begins = (
            suffix_array(torch.frombuffer(bytearray(texts), dtype=torch.uint8)).numpy()
            if texts
            else np.empty(0, np.int32)
        )
        begins_character = ((bytes_ & 0xC0) != 0x80) & (bytes_ != END[0])
        if not begins_character.all():
            begins = begins[begins_character[begins]]
        if not len(begins):
            raise UnsatisfiableError("corpus is empty: nothing occurs in it")
        super().__init__(texts, memoryview(begins))

    def count(self, text: str) -> int:
        """How often the text occurs in the corpus."""
        low, high = self._find(text)
        return high - low

    def places(self, text: str, limit: int | None = None) -> list[Place]:
        """Where the text occurs, ascending: every place, or the first `limit` in the order of what follows it there."""
        low, high = self._find(text)
        high = high if limit is None else min(high, low + limit)
        found = np.sort(np.asarray(self._begins[low:high]))
        documents = np.searchsorted(self._ends, found)
        begins = np.concatenate([[0], self._ends + 1])[documents]
        return [Place(int(document), int(offset)) for document, offset in zip(documents, found - begins, strict=True)]

    def value(self, text: str) -> list[Place]:
        """The places of the text, the first SHOWN_PLACES of them."""
        return self.places(text, SHOWN_PLACES)

    @cached_property
    def _ends(self) -> np.ndarray:
        """Where each document ends in the texts."""
        return np.flatnonzero(np.frombuffer(self._texts, np.uint8) == END[0])

    def _find(self, text: str) -> tuple[int, int]:
        wanted = _encode(text, "text")
        low = self._first(wanted, 0, len(self._begins), 0)
        return low, self._past(wanted, low, len(self._begins), 0)

    def _complete(self, low, high, depth):
        return depth > 0 and (self._at(low, depth, 1)[0] & 0xC0) != 0x80


class _BoundTexts(BoundConstraint):
    """The state is (low, high, depth): at the places low..high - 1 the text so far lies, `depth` bytes long."""

    can_fill_mask = True

    def __init__(self, index: _SortedTexts, vocabulary: Vocabulary):
        super().__init__(vocabulary)
        self._index = index
        self._refuse_if_unsatisfiable(repr(index))

    def start(self):
        return 0, len(self._index._begins), 0

    def complete(self, state):
        return self._index._complete(*state)

    def _accepts(self, state, token, text):
        low, high, depth = state
        place = self._index._first(text, low, high, depth)
        return place < high and self._index._at(place, depth, len(text)) == text

    def _advance(self, state, token, text):
        low, high, depth = state
        after = self._index._first(text, low, high, depth), self._index._past(text, low, high, depth), depth + len(text)
        if after[0] == after[1]:
            raise ValueError(
                f"{self._index!r}: token {token} ({text!r}) is not valid here, {self.allowed_text(state)} is"
            )
        return after

    def _allow(self, state, mask):
        """Walks the sorted tokens and the sorted texts side by side; each skips what the other does not have."""
        low, high, depth = state
        tokens, ids = self.vocabulary.by_text
        found: list[int] = []
        i = 0
        while i < len(tokens) and (low := self._index._first(tokens[i], low, high, depth)) < high:
            ahead = self._index._at(low, depth, self.vocabulary.longest)
            if ahead.startswith(tokens[i]):
                found += ids[i]
                i += 1
            else:  # the next valid token begins with what both share and the next byte of the text, or sorts after it
                shared = next(j for j, byte in enumerate(tokens[i]) if ahead[j : j + 1] != bytes([byte]))
                i = bisect_left(tokens, ahead[: shared + 1], i + 1)
        bitmask.add(mask, found)


def _encode(text: str, name: str) -> bytes:
    if not isinstance(text, str):
        raise ValueError(f"{name}: expected strings, got {text!r:.60}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: {text!r:.60} cannot be written as UTF-8: {error}") from error
