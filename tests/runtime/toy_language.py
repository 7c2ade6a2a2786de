"""A random language model over five letters, small enough that the probability of every text can be listed."""

import itertools
from functools import cache

import tokenizers
import torch
import transformers

LETTERS = "abcde"
EOS = 5


@cache
def toy():
    """(model, tokenizer): a Llama in float64 with 5 letters, two EOS ids and two rows of padding."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=9, max_position_embeddings=256, eos_token_id=[EOS, EOS + 1],
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=0.3)
    model.generation_config.eos_token_id = [EOS, EOS + 1]
    return model, tokenizer()


def tokenizer():
    names = {letter: token for token, letter in enumerate(LETTERS)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(names, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", additional_special_tokens=["<end>"]
    )


def law_of_texts(model, prompt, longest, temperature=1.0):
    """Probability of every text of at most `longest` letters, from the model's own forwards; the padding is left
    out."""
    law, ids = {}, [LETTERS.index(letter) for letter in prompt]
    front = {"": 1.0}
    for _ in range(longest):
        texts = list(front)
        batch = torch.tensor([ids + [LETTERS.index(letter) for letter in text] for text in texts])
        with torch.no_grad():
            p = (model(batch).logits[:, -1, : EOS + 2] / temperature).softmax(-1)
        front_after = {}
        for text, row in zip(texts, p.tolist(), strict=True):
            law[text] = front[text] * (row[EOS] + row[EOS + 1])
            for letter, mass in zip(LETTERS, row, strict=False):
                front_after[text + letter] = front[text] * mass
        front = front_after
    assert len(front) == len(LETTERS) ** longest == len(list(itertools.product(LETTERS, repeat=longest)))
    return law | front
