"""OneOf and Substring against scans of the strings and of the corpus; their files; where a substring occurs."""

import json
import random

import pytest
import walks

from hasten.guidance.text.constraints import Choice, OneOf, Place, Substring, UnsatisfiableError
from hasten.guidance.text.vocabulary import Vocabulary

VOCABULARY = walks.vocabulary()
END = (walks.EOS, walks.SECOND_EOS)


def names(count, seed=0):
    draw = random.Random(seed)
    parts = ["ab", "a", "é", "12", "ba", " ", "日本", "null", "\n", "\x00"]
    return ["".join(draw.choices(parts, k=draw.randrange(6))) for _ in range(count)]


def tokens_that(goes_on):
    """The text tokens of the small vocabulary for whose bytes the function holds."""
    return [token for token, text in enumerate(VOCABULARY.texts) if text is not None and goes_on(text)]


def walk(bound, seed, steps=12):
    """Texts of one random walk with their states, down to the last one."""
    draw, text, state = random.Random(seed), b"", bound.start()
    for _ in range(steps):
        yield text, state
        valid = [token for token in bound.allowed(state).tolist() if token not in END]
        if not valid:
            return
        token = draw.choice(valid)
        text, state = text + VOCABULARY.tokens[token], bound.advance(state, token)


@pytest.mark.parametrize("seed", range(4))
def test_the_tokens_that_go_on_to_one_of_the_strings(seed):
    strings = names(300, seed)
    encoded = {string.encode() for string in strings}
    bound = OneOf(strings).bind(VOCABULARY)
    for walked in range(8):
        for text, state in walk(bound, walked):
            expected = tokens_that(lambda token, text=text: any(s.startswith(text + token) for s in encoded))
            assert [t for t in bound.allowed(state).tolist() if t not in END] == expected
            assert [t for t in walks.allowed(bound, state) if t not in END] == expected
            assert bound.complete(state) == (text in encoded)


@pytest.mark.parametrize("seed", range(4))
def test_the_tokens_that_go_on_within_the_corpus(seed):
    documents = ["".join(names(20, 10 * seed + i)) for i in range(3)]
    encoded = [document.encode() for document in documents]
    bound = Substring(documents).bind(VOCABULARY)

    def occurs(text):
        """Whether the text lies in a document and begins with a whole character."""
        return bool(text) and (text[0] & 0xC0) != 0x80 and any(text in document for document in encoded)

    for walked in range(8):
        for text, state in walk(bound, walked):
            expected = tokens_that(lambda token, text=text: occurs(text + token))
            assert [t for t in bound.allowed(state).tolist() if t not in END] == expected
            assert [t for t in walks.allowed(bound, state) if t not in END] == expected
            assert bound.complete(state) == (occurs(text) and text.decode(errors="ignore").encode() == text)


def test_exactly_the_strings_are_accepted():
    strings = names(200)
    bound = OneOf(iter(strings)).bind(VOCABULARY)
    assert len(OneOf(strings)) == len(set(strings))
    for text in {*strings, *(s[:-1] for s in strings), *(s + "a" for s in strings)}:
        assert walks.accepts(bound, text) == (text in strings), text


def test_the_order_of_strings_and_their_repetition_do_not_matter():
    strings = names(50)
    one, other = OneOf(strings), OneOf([*reversed(strings), *strings])
    assert bytes(one._texts) == bytes(other._texts) and list(one._begins) == list(other._begins)


@pytest.mark.parametrize("documents", [["aaaa", "a", "", "aéa", "日本日"], ["ab"] * 3, [*names(40)]], ids=len)
def test_where_a_text_occurs(documents):
    index = Substring(documents)
    encoded = [document.encode() for document in documents]
    for text in ("a", "aa", "é", "日", "日本", "ab", "b", "none", "aé", "ba"):
        wanted = text.encode()
        expected = [
            Place(number, offset)
            for number, document in enumerate(encoded)
            for offset in range(len(document))
            if document.startswith(wanted, offset)
        ]
        assert index.places(text) == expected and index.count(text) == len(expected)
        some = index.places(text, limit=2)
        assert len(some) == min(2, len(expected)) and set(some) <= set(expected)


def test_no_text_crosses_the_border_of_two_documents():
    bound = Substring(["ab", "ba"]).bind(VOCABULARY)
    assert [walks.accepts(bound, text) for text in ("ab", "ba", "bb", "abba", "a", "")] == [1, 1, 0, 0, 1, 0]
    assert walks.accepts(Substring("abba").bind(VOCABULARY), "bb")


@pytest.mark.parametrize("tokens", [[b"a", b"b", b"ab", b"bab"], [b"ab", b"ba", b"aba"], [b"a", b"b"]], ids=str)
def test_a_substring_is_verbatim_whatever_the_tokens(tokens):
    corpus = "abbabaab"
    bound = Substring(corpus).bind(Vocabulary([*tokens, b"</s>"], eos=[len(tokens)]))

    def check(text, state):
        valid = [t for t in range(len(tokens)) if bound.check(state, t)]
        assert valid == [t for t in range(len(tokens)) if text + tokens[t].decode() in corpus]
        for t in valid:
            check(text + tokens[t].decode(), bound.advance(state, t))

    check("", bound.start())


@pytest.mark.parametrize("kind", [OneOf, Substring])
def test_saved_and_mapped_from_disk(kind, tmp_path):
    strings = names(100, seed=5)
    index = kind(strings)
    index.save(tmp_path / "new" / "index")
    loaded = kind.load(tmp_path / "new" / "index")
    files = [path.stat().st_size for path in (tmp_path / "new" / "index").glob("*.bin")]
    assert sum(files) == index.nbytes == loaded.nbytes
    loaded.save(tmp_path / "new" / "index")  # over the files that it is mapped from
    one, other = index.bind(VOCABULARY), kind.load(tmp_path / "new" / "index").bind(VOCABULARY)
    for seed in range(10):
        for _, state in walk(one, seed):
            assert one.allowed(state).tolist() == other.allowed(state).tolist()
    if kind is Substring:
        assert loaded.places("ab") == index.places("ab")


@pytest.mark.parametrize("kind", [OneOf, Substring])
def test_an_index_that_is_none(kind, tmp_path):
    with pytest.raises(ValueError, match="holds no index"):
        kind.load(tmp_path)
    other = {OneOf: Substring, Substring: OneOf}[kind]
    other(["a"]).save(tmp_path)
    with pytest.raises(ValueError, match=f"expected a {kind.__name__} index of version 1, got {other.__name__}"):
        kind.load(tmp_path)
    kind(["abc"]).save(tmp_path)
    (tmp_path / "texts.bin").write_bytes(b"ab")
    with pytest.raises(ValueError, match=r"texts\.bin: expected 4 bytes, got 2"):
        kind.load(tmp_path)
    about = json.loads((tmp_path / "index.json").read_text()) | {"version": 2}
    (tmp_path / "index.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="of version 2"):
        kind.load(tmp_path)
    for nothing in ([1], {"kind": kind.__name__, "version": 1, "integer": "i", "texts": 4}):
        (tmp_path / "index.json").write_text(json.dumps(nothing))
        with pytest.raises(ValueError, match=f"expected a {kind.__name__} index of version 1"):
            kind.load(tmp_path)
    kind(["abc"]).save(tmp_path)
    (tmp_path / "texts.bin").unlink()
    with pytest.raises(ValueError, match=r"holds no whole index: .*texts\.bin"):
        kind.load(tmp_path)


@pytest.mark.parametrize("kind", [OneOf, Substring])
def test_strings_that_are_none(kind):
    with pytest.raises(ValueError, match="expected strings, got 3"):
        kind(["a", 3])
    with pytest.raises(ValueError, match="expected strings, got None"):
        kind(None)
    with pytest.raises(ValueError, match="cannot be written as UTF-8"):
        kind(["a\ud800"])
    with pytest.raises(UnsatisfiableError, match="is empty"):
        kind([])


def test_strings_of_one_string():
    with pytest.raises(ValueError, match="expected several strings, got one"):
        OneOf("yes")
    with pytest.raises(UnsatisfiableError, match="is empty"):
        Substring(["", ""])


def test_strings_that_the_vocabulary_cannot_spell():
    with pytest.raises(UnsatisfiableError, match=r"OneOf.*no token of the vocabulary may come first"):
        OneOf(["b", "c"]).bind(Vocabulary([b"a", b"</s>"], eos=[1]))


def test_a_choice_is_one_of_a_few():
    bound = Choice(["yes", "no", "not"]).bind(VOCABULARY)
    assert [walks.accepts(bound, text) for text in ("yes", "no", "not", "n", "nope", "")] == [1, 1, 1, 0, 0, 0]
