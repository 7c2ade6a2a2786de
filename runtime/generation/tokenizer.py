"""The bytes of each token of a transformers tokenizer, as far as a model predicts them."""

import json
import re
import weakref

from torch import nn

from hasten.guidance.text.vocabulary import Vocabulary

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE = "▁"
# A model has some rows more than its tokenizer has ids, because of rounding up; with so many more it is another's.
MOST_PADDING = 1.5

_known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def vocabulary_of(tokenizer, model: nn.Module) -> Vocabulary:
    """The vocabulary that `tokenizer` and `model` share: the tokenizer's ids that the model has rows for.

    Rows that are padding are left out. EOS are the ids of the model's generation config and the tokenizer's own. The
    result is remembered for as long as the tokenizer lives.

    Raises:
        ValueError: a tokenizer that does not belong to the model, that has no EOS, or whose tokens are not bytes of the
            text (WordPiece).
    """
    rows = model.config.get_text_config().vocab_size
    eos = tuple(sorted(_eos_ids(tokenizer, model)))
    key = (rows, eos, len(tokenizer))
    if tokenizer not in _known or key not in _known[tokenizer]:
        _known.setdefault(tokenizer, {})[key] = _build(tokenizer, rows, eos)
    return _known[tokenizer][key]


def _build(tokenizer, rows: int, eos: tuple[int, ...]) -> Vocabulary:
    names = {token: name for name, token in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    beyond = [token for token in names if token >= rows and token not in added]
    count = 1 + max((token for token in names if token < rows), default=-1)
    if beyond or rows > count * MOST_PADDING:
        raise ValueError(
            f"the tokenizer does not belong to the model: it has ids 0..{max(names, default=-1)}, the model predicts "
            f"0..{rows - 1}"
        )
    special = {*tokenizer.all_special_ids, *(token for token, about in added.items() if about.special)}
    to_bytes = _spelling(tokenizer)
    tokens = [b""] * count
    for token, name in names.items():
        if token < count:
            tokens[token] = added[token].content.encode() if token in added else to_bytes(name)
    return Vocabulary(tokens, [token for token in eos if token < count], {token for token in special if token < count})


def _eos_ids(tokenizer, model: nn.Module) -> set[int]:
    config = getattr(model, "generation_config", None)
    ids = getattr(config, "eos_token_id", None)
    ids = [] if ids is None else [ids] if isinstance(ids, int) else ids
    return {int(token) for token in [*ids, tokenizer.eos_token_id] if token is not None}


def _spelling(tokenizer):
    """How the tokenizer writes bytes in the names of its tokens: a function from name to bytes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None and hasattr(tokenizer, "sp_model"):
        return _from_sentencepiece
    decoder = backend.decoder if backend is not None else None
    parts = json.loads(decoder.__getstate__()) if decoder is not None else {}
    parts = parts.get("decoders", [parts])
    kinds = {part.get("type") for part in parts}
    if "ByteLevel" in kinds:
        return _from_byte_level
    spaced = any(SPACE in (part.get("replacement"), part.get("pattern", {}).get("String")) for part in parts)
    if spaced:
        return _from_sentencepiece if "ByteFallback" in kinds else _from_metaspace
    found = ", ".join(sorted(map(str, kinds - {None}))) or "none"
    raise ValueError(
        f"the tokenizer ({type(tokenizer).__name__}, decoder: {found}) is neither a byte-level BPE nor of "
        "SentencePiece's kind: what bytes its tokens stand for is not known"
    )


def _from_metaspace(name: str) -> bytes:
    return name.replace(SPACE, " ").encode()


def _from_sentencepiece(name: str) -> bytes:
    byte = BYTE.fullmatch(name)
    return bytes([int(byte[1], 16)]) if byte else _from_metaspace(name)


def _from_byte_level(name: str) -> bytes:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for the characters from 256 on."""
    return b"".join(_BYTE_OF.get(character) or character.encode() for character in name)


_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(byte): bytes([byte]) for byte in _PRINTABLE} | {
    chr(256 + place): bytes([byte]) for place, byte in enumerate(_OTHERS)
}
