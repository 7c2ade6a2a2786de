"""TransNormer: a plain float64 forward, the cache in every way of generating, and the names of the released
checkpoint."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

import hasten
from hasten.kernels.recurrence.linear_attention.features import alibi_slopes
from hasten.models.transnormer import TransNormerCache, TransNormerModel

SIZES = {
    "vocab_size": 61,
    "decoder_embed_dim": 24,
    "hidden_dim": 24,
    "decoder_layers": 3,
    "decoder_attention_heads": 3,
    "glu_dim": 40,
    "linear_use_lrpe_list": [1, 0, 1],
    "init_std": 0.2,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}

# Parameter names of OpenNLPLab's modeling_transnormer.py (TransNormerLLM-7B): norms have no weights, slopes are no
# buffers, theta only with LRPE.
NAMES = {
    "model.embed_tokens.weight",
    "model.layers.0.token_mixer.lrpe.theta",
    "model.layers.2.token_mixer.lrpe.theta",
    "lm_head.weight",
    *(
        f"model.layers.{layer}.{name}.weight"
        for layer in range(3)
        for name in (
            "token_mixer.qkvu_proj",
            "token_mixer.out_proj",
            "channel_mixer.l1",
            "channel_mixer.l2",
            "channel_mixer.l3",
        )
    ),
}


def build(seed: int = 0, **changes):
    torch.manual_seed(seed)
    return hasten.TransNormer(hasten.TransNormerConfig(**(SIZES | changes))).eval().requires_grad_(False)


def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    return build()


def plain(model, ids):
    """Logits of one row [T] in float64, attention as a whole T x T matrix."""
    c, weights = model.config, {name: value.double() for name, value in model.state_dict().items()}
    T, L, H = len(ids), c.decoder_layers, c.decoder_attention_heads
    D = c.hidden_dim // H
    slope = {3: [2**-4, 2**-8, 2**-2], 4: [2**-2, 2**-4, 2**-6, 2**-8]}[H]
    t = torch.arange(T, dtype=torch.float64)
    distance = t[:, None] - t

    def norm(x):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)

    def at(name):
        return weights[f"model.layers.{layer}.{name}"]

    x = weights["model.embed_tokens.weight"][ids] * (1 if c.no_scale_embedding else c.decoder_embed_dim**0.5)
    for layer in range(L):
        q, k, v, u = (norm(x) @ at("token_mixer.qkvu_proj.weight").T).split(c.hidden_dim, -1)
        q, k = q * torch.sigmoid(q), k * torch.sigmoid(k)
        heads = []
        for h in range(H):
            part = slice(h * D, (h + 1) * D)
            scores = q[:, None, part] * k[None, :, part]
            if c.linear_use_lrpe_list[layer]:
                scores = scores * torch.cos(distance[..., None] * at("token_mixer.lrpe.theta")[h, 0])
            rate = slope[h] * (1 - layer / (L - 1) + 1e-5)
            weight = torch.where(distance >= 0, torch.exp(-rate * distance.clamp(min=0)), 0)
            heads.append((scores.sum(-1) * weight) @ v[:, part])
        x = x + (u * norm(torch.cat(heads, -1))) @ at("token_mixer.out_proj.weight").T
        y = norm(x)
        gated = (y @ at("channel_mixer.l1.weight").T) * (y @ at("channel_mixer.l2.weight").T)
        x = x + gated @ at("channel_mixer.l3.weight").T
    return norm(x) @ weights["lm_head.weight"].T


def close(out, expected, tolerance=1e-5):
    assert (out.double() - expected.double()).norm() <= tolerance * expected.double().norm()


@pytest.mark.parametrize("changes", [{}, {"decoder_attention_heads": 4, "no_scale_embedding": True}], ids=["3", "4"])
def test_logits_are_those_of_the_plain_forward(changes):
    model, ids = build(**changes), tokens(2, 37)
    out = model(ids, use_cache=False)
    assert out.past_key_values is None
    close(out.logits, torch.stack([plain(model, row) for row in ids]))


def test_slopes_follow_alibi():
    assert alibi_slopes(8).tolist() == [2**-h for h in range(1, 9)]
    expected = [2**-h for h in range(1, 9)] + [2 ** -(h + 0.5) for h in range(4)]
    assert alibi_slopes(12).tolist() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("pieces", [[37], [1] * 37, [20, 1, 1, 9, 5, 1]], ids=["whole", "steps", "mixed"])
def test_a_cache_changes_nothing(model, pieces):
    ids, cache, logits = tokens(2, 37), None, []
    for piece in ids.split(pieces, 1):
        out = model(piece, past_key_values=cache)
        cache = out.past_key_values
        logits.append(out.logits)
    close(torch.cat(logits, 1), model(ids, use_cache=False).logits)
    assert cache.get_seq_length() == 37 and cache.lengths.tolist() == [37, 37]


def test_the_state_has_constant_size_and_is_float32():
    model = build().bfloat16()
    cache = model(tokens(2, 5)).past_key_values
    shapes = [cache.state(layer).shape for layer in range(3)]
    assert shapes == [(2, 3, 16, 8), (2, 3, 8, 8), (2, 3, 16, 8)]
    out = model(tokens(2, 300), past_key_values=cache)
    assert [cache.state(layer).shape for layer in range(3)] == shapes
    assert cache.state(0).dtype == torch.float32
    assert out.logits.dtype == torch.bfloat16 and out.logits.isfinite().all()


def test_padding_counts_for_nothing_wherever_it_stands(model):
    """Rows of different lengths, padded on the left in two turns, are what each row is alone."""
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :4] = mask[1, 11:13] = 0
    first = model(ids[:, :11], attention_mask=mask[:, :11])
    second = model(ids[:, 11:], attention_mask=mask, past_key_values=first.past_key_values)
    logits = torch.cat([first.logits, second.logits], 1)
    for row in range(2):
        kept = mask[row].bool()
        close(logits[row, kept], model(ids[row : row + 1, kept], use_cache=False).logits[0])
    assert second.past_key_values.lengths.tolist() == [16, 18]


def without_cache(model, ids, n):
    for _ in range(n):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("chunk", [None, 4], ids=["prefill", "prefill in chunks"])
def test_greedy(model, chunk):
    ids = tokens(2, 11)
    assert torch.equal(
        model.generate(ids, max_new_tokens=9, do_sample=False, prefill_chunk_size=chunk), without_cache(model, ids, 9)
    )


def test_greedy_in_a_left_padded_batch(model):
    ids, mask = tokens(2, 11), torch.ones(2, 11, dtype=torch.long)
    ids[0, :5] = mask[0, :5] = 0
    out = model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)
    assert torch.equal(out[:1, 5:], without_cache(model, ids[:1, 5:], 9))
    assert torch.equal(out[1:], without_cache(model, ids[1:], 9))


@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_beams_and_samples_are_those_without_a_cache(model, mode):
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        found.append(model.generate(tokens(2, 11), max_new_tokens=7, use_cache=use_cache, **mode))
    assert torch.equal(*found)


def test_a_second_turn_continues_the_cache(model):
    ids = tokens(1, 8)
    first = model.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, tokens(1, 4, seed=9)], 1)
    second = model.generate(longer, past_key_values=first.past_key_values, max_new_tokens=5, do_sample=False)
    assert torch.equal(second, without_cache(model, longer, 5))


def test_names_and_shapes_of_the_release(model):
    state = model.state_dict()
    assert set(state) == NAMES
    assert state["model.layers.0.token_mixer.qkvu_proj.weight"].shape == (96, 24)
    theta = state["model.layers.0.token_mixer.lrpe.theta"]
    assert theta.shape == (3, 1, 8)
    torch.testing.assert_close(theta[1, 0, 2], torch.tensor(10000 ** (-2 / 24 * 10)))
    assert set(build(linear_use_lrpe_list=[]).state_dict()) == {name for name in NAMES if "theta" not in name}


def test_a_folder_like_the_release_loads_without_remote_code(model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {
        "architectures": ["TransnormerForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_transnormer.TransnormerConfig",
            "AutoModelForCausalLM": "modeling_transnormer.TransnormerForCausalLM",
        },
    }
    assert config["model_type"] == "transnormer"
    path.write_text(json.dumps(config))
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False, output_loading_info=True)
    assert type(loaded) is hasten.TransNormer
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(loaded(tokens(1, 9)).logits, model(tokens(1, 9)).logits)


def test_the_auto_classes_know_it():
    config = AutoConfig.for_model("transnormer", **SIZES)
    assert isinstance(config, hasten.TransNormerConfig)
    assert type(AutoModel.from_config(config)) is TransNormerModel
    assert type(AutoModelForCausalLM.from_config(config)) is hasten.TransNormer


def test_one_layer_and_tied_embeddings():
    model = build(decoder_layers=1, linear_use_lrpe_list=[1], tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model(tokens(1, 6)).logits.isfinite().all()


def test_gradients_come_from_the_definition(model):
    trained = build().requires_grad_(True)
    loss = trained(tokens(2, 9), labels=tokens(2, 9)).loss
    loss.backward()
    assert loss.isfinite() and all(parameter.grad is not None for parameter in trained.parameters())


@pytest.mark.parametrize(
    "name, value",
    [
        ("norm_type", "layernorm"),
        ("linear_act_fun", "1+elu"),
        ("linear_use_lrpe_list", [1, 0]),
        ("linear_use_lrpe_list", [1, 0, 2]),
        ("hidden_dim", 25),
        ("glu_dim", 0),
        ("decoder_layers", 0),
    ],
)
def test_values_that_it_cannot_compute_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        hasten.TransNormerConfig(**(SIZES | {name: value}))


def test_what_a_recurrent_state_cannot_do_is_refused(model):
    cache = model(tokens(1, 5)).past_key_values
    assert isinstance(cache, TransNormerCache)
    with pytest.raises(NotImplementedError, match="cannot be rolled back"):
        cache.crop(2)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(tokens(1, 5), assistant_model=model, max_new_tokens=3)
    with pytest.raises(ValueError, match="TransNormerCache, got a DynamicCache"):
        model(tokens(1, 5), past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="attention_mask"):
        model(tokens(1, 5), attention_mask=torch.ones(1, 4))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
