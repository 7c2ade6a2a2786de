"""The bytes of tokens: what is tokenized is what the tokens' bytes spell."""

import pytest
import tokenizers
import transformers
from tiny_models import build
from toy_language import tokenizer, toy

import hasten
from hasten.generation.tokenizer import vocabulary_of

TEXTS = ["def read(self):\n\treturn 0x1F  # größer\r\n", "naïve 日本語 🙂\x00\x7f", "a\xa0b\xad<|eos|", " "]


def model_with(rows, eos=None):
    model = build("llama")
    model.config.vocab_size = rows
    model.generation_config.eos_token_id = eos
    return model


def test_byte_level_tokens_spell_the_text():
    folder = hasten.embedded_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    vocabulary = vocabulary_of(tokenizer, model_with(4096))
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(vocabulary.tokens[token] for token in ids) == text.encode()
    assert len(vocabulary) == 4096 and vocabulary.eos == (1,) and vocabulary.special == {0, 1}


def sentencepiece(byte_fallback):
    pieces = ["<unk>", "</s>", "▁", "▁a", "a", "b", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({piece: token for token, piece in enumerate(pieces)}, [("▁", "a")], unk_token="<unk>",
                              byte_fallback=byte_fallback)
    )  # fmt: skip
    backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    decoders = tokenizers.decoders
    parts = [decoders.Replace("▁", " "), *([decoders.ByteFallback()] if byte_fallback else []), decoders.Fuse()]
    backend.decoder = decoders.Sequence(parts)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def test_sentencepiece_with_byte_fallback_spells_the_text():
    tokenizer = sentencepiece(True)
    vocabulary = vocabulary_of(tokenizer, model_with(300))
    for text in [*TEXTS, "a ab  a"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(vocabulary.tokens[token] for token in ids) == text.encode()
    assert vocabulary.special == {0, 1}


def test_without_byte_fallback_such_names_are_text():
    vocabulary = vocabulary_of(sentencepiece(False), model_with(300))
    assert vocabulary.tokens[6] == b"<0x00>" and vocabulary.tokens[3] == b" a"


def test_every_eos_counts_and_padding_does_not():
    model, tokens = toy()
    vocabulary = vocabulary_of(tokens, model)
    assert vocabulary.eos == (5, 6) and len(vocabulary) == 7
    assert vocabulary_of(tokenizer(), model_with(9)).eos == (5,)


def test_added_tokens_are_text_unless_they_are_special():
    tokens = tokenizer()
    tokens.add_tokens(["<tool>"])
    vocabulary = vocabulary_of(tokens, model_with(9))
    assert vocabulary.tokens[7] == b"<tool>" and vocabulary.special == {5, 6}


def test_added_tokens_beyond_the_models_rows_are_left_out():
    tokens = tokenizer()
    tokens.add_tokens(["<image>"])
    assert len(vocabulary_of(tokens, model_with(7))) == 7


def test_a_vocabulary_is_built_once_and_anew_when_the_tokenizer_grows():
    tokens, model = tokenizer(), model_with(9)
    first = vocabulary_of(tokens, model)
    assert vocabulary_of(tokens, model) is first
    tokens.add_tokens(["<more>"])
    assert len(vocabulary_of(tokens, model)) == len(first) + 1


def test_tokenizers_that_cannot_be_used():
    with pytest.raises(ValueError, match=r"does not belong to the model: it has ids 0\.\.6, the model predicts 0\.\.3"):
        vocabulary_of(tokenizer(), model_with(4))
    with pytest.raises(ValueError, match=r"it has ids 0\.\.6, the model predicts 0\.\.99"):
        vocabulary_of(tokenizer(), model_with(100))
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({"a": 0, "##b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.decoder = tokenizers.decoders.WordPiece()
    pieces = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[UNK]")
    with pytest.raises(
        ValueError, match=r"decoder: WordPiece.* is neither a byte-level BPE nor of SentencePiece's kind"
    ):
        vocabulary_of(pieces, model_with(3))
    endless = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer)
    with pytest.raises(ValueError, match="eos is empty"):
        vocabulary_of(endless, model_with(8))
