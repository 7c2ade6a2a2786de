"""One cache for many texts: a row is what its text alone would give, however it came about."""

import pytest
import torch
import transformers
from tiny_models import build
from toy_language import toy

from hasten.errors import UnsupportedModelError
from hasten.generation.decoder import CachedDecoder

NAMES = ["llama", "mistral", "qwen3", "gemma3", "phi3", "opt", "gpt_neox"]


def alone(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1]


@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_its_text_alone(name):
    """Prompts of different lengths, longer than the sliding windows, then forks in every direction."""
    model = build(name, torch.float64)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 290, (length,), generator=generator).tolist() for length in (5, 40, 1)]
    decoder = CachedDecoder(model)
    logits = decoder.prefill(texts)
    for rows in ([0, 1, 2], [1, 1, 0, 2, 0], [4, 0, 1], [2], [0, 0]):
        for text, row in zip(texts, logits, strict=True):
            torch.testing.assert_close(row, alone(model, text), atol=1e-9, rtol=0)
        tokens = torch.randint(3, 290, (len(rows),), generator=generator).tolist()
        logits = decoder.step(tokens, rows)
        texts = [[*texts[row], token] for row, token in zip(rows, tokens, strict=True)]
    torch.testing.assert_close(logits[1], alone(model, texts[1]), atol=1e-9, rtol=0)


def test_a_recurrent_state_forks_too():
    from hasten.models.transnormer import TransNormer, TransNormerConfig

    torch.manual_seed(0)
    config = TransNormerConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    model = TransNormer(config).eval().requires_grad_(False)
    decoder = CachedDecoder(model)
    decoder.prefill([[5, 6, 7], [8]])
    logits = decoder.step([9, 10, 11], [1, 0, 0])
    for row, text in zip(logits, ([8, 9], [5, 6, 7, 10], [5, 6, 7, 11]), strict=True):
        torch.testing.assert_close(row, alone(model, text), atol=1e-4, rtol=1e-4)


def test_padding_before_a_purely_recurrent_model():
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2)
    model = transformers.MambaForCausalLM(config).double().eval().requires_grad_(False)
    decoder = CachedDecoder(model)
    decoder.prefill([[5, 6, 7, 8], [9]])
    for step, text in enumerate(([9, 10], [9, 10, 11])):
        logits = decoder.step([text[-1], text[-1], 12], [1, 1, 0] if step == 0 else [0, 1, 2])
        for row in (0, 1):
            torch.testing.assert_close(logits[row], alone(model, text), atol=1e-9, rtol=0)
    torch.testing.assert_close(logits[2], alone(model, [5, 6, 7, 8, 12, 12]), atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt"])
def test_a_forked_cache_gives_the_bits_of_a_fresh_prefill(name):
    model = build(name)
    prompts = [[7, 8, 9, 10], [20, 21, 22, 23], [30, 31, 32, 33]]
    rows, tokens = [2, 0, 0], [5, 6, 7]
    forked, fresh = CachedDecoder(model), CachedDecoder(model)
    forked.prefill(prompts)
    fresh.prefill([prompts[row] for row in rows])
    assert torch.equal(forked.step(tokens, rows), fresh.step(tokens, [0, 1, 2]))


def test_two_prompts_with_the_same_suffix_differ():
    model, _ = toy()
    first, second = CachedDecoder(model).prefill([[0, 1, 2, 3], [4, 1, 2, 3]])
    assert (first - second).abs().max() > 1e-3


def test_encoder_decoders_are_refused():
    config = transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=20)
    with pytest.raises(UnsupportedModelError, match=r"T5ForConditionalGeneration.*use a causal LM"):
        CachedDecoder(transformers.T5ForConditionalGeneration(config))


def test_models_without_a_cache_of_transformers_are_refused():
    config = transformers.RwkvConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2)
    model = transformers.RwkvForCausalLM(config).eval()
    with pytest.raises(UnsupportedModelError, match="has no cache that texts can share"):
        CachedDecoder(model).prefill([[5, 6]])
