"""Facts about a model: the same for every class, with or without the attribute that they are read from."""

import sys

import torch
import transformers
from tiny_models import build

from hasten.model_facts import cache_of, device_of, longest_input, progress, synchronize, vocabulary

MAMBA = transformers.MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2)


def test_sizes_come_from_the_embedding_and_the_configuration():
    model = build("llama")
    assert vocabulary(model) == model.get_input_embeddings().weight.shape[0]
    assert longest_input(model) == model.config.max_position_embeddings
    mamba = transformers.MambaForCausalLM(MAMBA)  # its configuration names no number of positions
    assert vocabulary(mamba) == 60 and longest_input(mamba) == sys.maxsize
    assert device_of(model) == torch.device("cpu")
    synchronize(device_of(model))


def test_a_cache_goes_by_the_name_of_its_argument():
    ids = torch.tensor([[5, 6, 7, 8]])
    for model, name in ((build("llama"), "past_key_values"), (transformers.MambaForCausalLM(MAMBA), "cache_params")):
        model = model.double().eval().requires_grad_(False)
        whole = model(input_ids=ids).logits[0, -1]
        cache = cache_of(model(input_ids=ids[:, :-1], use_cache=True))
        assert list(cache) == [name]
        torch.testing.assert_close(model(input_ids=ids[:, -1:], use_cache=True, **cache).logits[0, -1], whole)


def test_progress_passes_on_what_it_is_given(capsys):
    assert list(progress(range(3), "counting", unit="step")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
