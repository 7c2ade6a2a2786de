"""OneOf with 1,000,000 names and Substring over 100 MB of text: time of building, bytes of the index, time per check.

The names are made of syllables, the corpus is the Python source of the installed packages, the vocabulary is all bytes
and the most frequent pieces of the corpus. Times are CPU time of the one thread. The allowed next tokens at some
prefixes are compared with a scan. Run by hand:

    python -m hasten.bench.guidance.indexed_texts --json bench/results/indexed-texts-cpu-1-thread.json
"""

import argparse
import json
import random
import re
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from hasten.guidance.text.constraints import OneOf, Substring
from hasten.guidance.text.vocabulary import Vocabulary

SYLLABLES = [a + b for a in ("b", "ch", "d", "f", "k", "l", "m", "n", "r", "s", "t", "v") for b in "aeiouéö"]
PIECES = re.compile(rb" ?[A-Za-z]+|[0-9]|[^\sA-Za-z0-9]+|\s+")
LONGEST_SCAN = 200_000


def names(count: int, seed: int = 0) -> list[str]:
    """Distinct names of two or three words."""
    draw = random.Random(seed)
    found: set[str] = set()
    while len(found) < count:
        words = (
            "".join(draw.choices(SYLLABLES, k=draw.randrange(2, 5))).capitalize() for _ in range(draw.randrange(2, 4))
        )
        found.add(" ".join(words))
    return sorted(found)


def source_files(size: int) -> list[str]:
    """Python files of this environment, `size` bytes of UTF-8 at most."""
    found, total = [], 0
    for path in sorted(Path(torch.__file__).parents[1].rglob("*.py")) + sorted(
        Path(sysconfig.get_path("stdlib")).rglob("*.py")
    ):
        text = path.read_text(encoding="utf-8", errors="ignore")
        length = len(text.encode())
        if total + length + 1 <= size:
            found.append(text)
            total += length + 1
    return found


def vocabulary(text: bytes, size: int) -> Vocabulary:
    """All bytes, then the most frequent pieces of the text, then EOS."""
    frequent = [piece for piece, _ in Counter(PIECES.findall(text)).most_common(size) if 1 < len(piece) <= 24]
    return Vocabulary(
        [*(bytes([i]) for i in range(256)), *frequent[: size - 257], b"</s>"], eos=[256 + len(frequent[: size - 257])]
    )


def measure(make: Callable, load: Callable, texts: list[bytes], tokens: Vocabulary, folder: Path) -> dict:
    """Builds the index, saves it, maps it and checks tokens along texts that satisfy it,
    each split into long tokens."""
    begin = time.thread_time()
    index = make()
    built = time.thread_time() - begin
    index.save(folder)
    begin = time.thread_time()
    mapped = load(folder)
    loaded = time.thread_time() - begin
    found = {
        "build_seconds": built,
        "load_seconds": loaded,
        "bytes_in_memory": index.nbytes,
        "bytes_on_disk": sum(path.stat().st_size for path in folder.iterdir()),
    }
    for name, used in (("memory", index), ("mapped", mapped)):
        found[name] = times(used.bind(tokens), texts, tokens)
    return found


def times(bound, texts: list[bytes], tokens: Vocabulary) -> dict:
    """Microseconds per check of the right token and of random tokens, per advance and per mask,
    over the states along the texts."""
    draw = random.Random(1)
    ids = {text: token for token, text in enumerate(tokens.tokens)}
    measured: dict[str, list[float]] = {"check_valid": [], "check_random": [], "advance": [], "fill_mask": []}

    def clock(name, repeat, call):
        begin = time.thread_time()
        for _ in range(repeat):
            call()
        measured[name].append((time.thread_time() - begin) / repeat * 1e6)

    for text in texts:
        state = bound.start()
        while text:
            right = next(ids[text[:length]] for length in range(min(24, len(text)), 0, -1) if text[:length] in ids)
            some = [draw.randrange(len(tokens) - 1) for _ in range(16)]
            bound.check(state, right)
            clock("check_valid", 8, lambda state=state, right=right: bound.check(state, right))
            clock("check_random", 1, lambda state=state, some=some: [bound.check(state, token) for token in some])
            measured["check_random"][-1] /= len(some)
            clock("advance", 4, lambda state=state, right=right: bound.advance(state, right))
            if draw.random() < 0.02:
                clock("fill_mask", 1, lambda state=state: bound.allowed(state))
            text, state = text[len(tokens.tokens[right]) :], bound.advance(state, right)
    return {
        f"{name}_microseconds": {
            "median": median(values),
            "mean": sum(values) / len(values),
            "p90": sorted(values)[int(0.9 * len(values))],
            "max": max(values),
            "count": len(values),
        }
        for name, values in measured.items()
    }


def agrees_with_scan(bound, prefixes: list[bytes], following: Callable[[bytes], set[bytes]], tokens: Vocabulary) -> int:
    """How many prefixes were compared: the tokens that the index allows with those that a scan finds;
    raises where they differ."""
    ids = {text: token for token, text in enumerate(tokens.tokens)}
    for prefix in prefixes:
        state = bound.start()
        for byte in prefix:
            state = bound.advance(state, byte)
        ahead = following(prefix)
        expected = {ids[text[:n]] for text in ahead for n in range(1, len(text) + 1) if text[:n] in ids}
        if set(bound.allowed(state).tolist()) - set(tokens.eos) != expected:
            raise AssertionError(f"after {prefix!r} the index and a scan allow different tokens")
    return len(prefixes)


def after_prefix_of_names(encoded: list[bytes], prefix: bytes) -> set[bytes]:
    """What follows the prefix in sorted names, 24 bytes at most."""
    return {name[len(prefix) : len(prefix) + 24] for name in encoded if name.startswith(prefix)}


def after_occurrences(documents: list[bytes], text: bytes) -> set[bytes]:
    """What follows the text anywhere in the documents, 24 bytes at most."""
    found: set[bytes] = set()
    for document in documents:
        place = document.find(text)
        while place >= 0:
            found.add(document[place + len(text) : place + len(text) + 24])
            place = document.find(text, place + 1)
        if len(found) > LONGEST_SCAN:
            raise AssertionError(f"{text!r} is too frequent to scan for")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", type=int, default=1_000_000)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--tokens", type=int, default=32_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(0)

    strings = names(arguments.names)
    documents = source_files(round(arguments.megabytes * 1e6))
    encoded = [document.encode() for document in documents]
    size = sum(map(len, encoded)) + len(encoded)
    tokens = vocabulary(b"\n".join(encoded), arguments.tokens)
    with tempfile.TemporaryDirectory() as folder:
        chosen = [draw.choice(strings).encode() for _ in range(400)]
        one_of = measure(lambda: OneOf(strings), OneOf.load, chosen, tokens, Path(folder, "names"))
        bound = OneOf.load(Path(folder, "names")).bind(tokens)
        sorted_names = sorted(name.encode() for name in strings)
        prefixes = [chosen[i][: draw.randrange(0, 8)] for i in range(10)]
        one_of["prefixes_compared_with_scan"] = agrees_with_scan(
            bound, prefixes, lambda prefix: after_prefix_of_names(sorted_names, prefix), tokens
        )
        quotes = []
        while len(quotes) < 200:
            document = draw.choice(encoded)
            place = draw.randrange(max(1, len(document) - 200))
            quote = document[place : place + 100].decode(errors="ignore").encode()
            if quote and (quote[0] & 0xC0) != 0x80 and quote == document[place : place + len(quote)]:
                quotes.append(quote)
        substring = measure(lambda: Substring(documents), Substring.load, quotes, tokens, Path(folder, "corpus"))
        bound = Substring.load(Path(folder, "corpus")).bind(tokens)
        prefixes = [quote[: draw.randrange(8, 20)] for quote in quotes[:10]]
        substring["prefixes_compared_with_scan"] = agrees_with_scan(
            bound, prefixes, lambda prefix: after_occurrences(encoded, prefix), tokens
        )
    text_bytes = sum(len(string.encode()) for string in strings)
    one_of |= {
        "strings": len(strings),
        "text_bytes": text_bytes,
        "bytes_per_string": one_of["bytes_in_memory"] / len(strings),
    }
    substring |= {
        "documents": len(documents),
        "text_bytes": size,
        "bytes_per_byte": substring["bytes_in_memory"] / size,
    }
    records = {"vocabulary": len(tokens), "one_of": one_of, "substring": substring}
    text = json.dumps(records, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
