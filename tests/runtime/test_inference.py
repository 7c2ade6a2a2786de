"""Any model is run on token ids or on what its processor returns, neither depending on what it remembers nor changing
it."""

import pytest
import torch
from tiny_models import token_ids

from hasten.acceleration.inference import Inference
from hasten.acceleration.undisturbed import undisturbed
from hasten.bench.runtime import tiny_inputs
from hasten.bench.runtime.tiny_zoo import build
from hasten.errors import HastenError, UnsupportedModelError

TOLERANCE = 1e-5
# Decoders of every way to take positions and caches; the last three read the whole text in every step.
TEXT = {
    "rotary": ("causal", "llama"),
    "learned positions": ("causal", "gpt2"),
    "positions from a mask": ("causal", "opt"),
    "alibi": ("causal", "bloom"),
    "positions of a hybrid": ("causal", "bamba"),
    "no positions": ("causal", "mamba2"),
    "a cache that generate makes": ("causal", "recurrent_gemma"),
    "an encoder as decoder": ("causal", "bert"),
    "a decoder of an encoder-decoder": ("causal", "bart"),
    "three axes": ("image-text", "qwen2_vl"),
    "encoder-decoder": ("encoder-decoder", "t5"),
    "encoder-decoder with experts": ("encoder-decoder", "switch_transformers"),
    "no cache": ("causal", "openai-gpt"),
    "no cache of its own": ("causal", "blt"),
    "an encoder without a mask over what comes": ("encoder-decoder", "encoder-decoder"),
}


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def test_a_batch_has_positions_of_its_own():
    ids = token_ids(3, 24)
    run = Inference(build("image-text", "kosmos-2"), ids)  # looks positions up row by row
    assert distance(run.decode(ids, 9)[:1], run.decode(ids[:1], 9)) < TOLERANCE


@pytest.mark.parametrize("name", TEXT)
def test_decode_gives_the_logits_of_the_prefill(name):
    run, ids = Inference(build(*TEXT[name])), token_ids(2, 24)
    with undisturbed(run.model):
        expected, _ = run.prefill(ids)
    assert distance(run.decode(ids, 9), expected[:, 8:]) < TOLERANCE


@pytest.mark.parametrize("name", ["rotary", "learned positions", "positions from a mask", "alibi", "three axes"])
def test_left_padding_changes_nothing(name):
    run, ids = Inference(build(*TEXT[name])), token_ids(3, 24)
    mask = torch.ones_like(ids)
    mask[0, :7] = mask[1, :3] = 0
    found = run.decode({"input_ids": ids, "attention_mask": mask}, 14)
    for row, first in ((0, 7), (1, 3), (2, 0)):
        assert distance(found[row], run.decode(ids[row, first:], 14 - first)[0]) < TOLERANCE


@pytest.mark.parametrize(("kind", "model_type"), tiny_inputs.INPUTS)
@torch.no_grad()
def test_pictures_and_speech(kind, model_type):
    model = build(kind, model_type)
    inputs = tiny_inputs.INPUTS[kind, model_type](model)
    run = Inference(model, inputs)
    with undisturbed(model):
        expected, _ = run.prefill(inputs)
    found = run.decode(inputs, 3)
    assert found.shape[1] == run.token_ids(inputs).shape[1] - max(3, run.shortest_prefix(inputs)) + 1
    if model_type != "paligemma":  # in its prompts all tokens see all others, so a longer one has other predictions
        assert distance(found, expected[:, -found.shape[1] :]) < TOLERANCE
    assert distance(run.forward(inputs)[:, -1], expected[:, -1]) < TOLERANCE


def test_a_prefix_never_cuts_an_image():
    model = build("image-text", "llava")
    inputs = tiny_inputs.with_pixels(model, 16)
    assert Inference(model, inputs).shortest_prefix(inputs) == 20
    assert Inference(model).shortest_prefix(token_ids(1, 9)) == 1


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_5", "glm4v"])
@torch.no_grad()
def test_nothing_depends_on_what_the_model_has_read_before(model_type):
    model, ids = build("image-text", model_type), token_ids(1, 24)
    picture = tiny_inputs.with_grid(model)
    run = Inference(model)
    text, image = run.decode(ids, 9), run.decode(picture, 9)
    model(**tiny_inputs.with_grid(model, rows=2))
    remembered = [vars(module)["rope_deltas"] for module in model.modules() if "rope_deltas" in vars(module)]
    assert remembered[0].shape[0] == 2
    assert torch.equal(run.decode(ids, 9), text)
    assert torch.equal(run.decode(picture, 9), image)
    assert all(
        module.rope_deltas is before
        for module, before in zip((m for m in model.modules() if "rope_deltas" in vars(m)), remembered, strict=True)
    )


@torch.no_grad()
def test_an_interrupted_run_leaves_what_the_model_remembers():
    model = build("image-text", "qwen2_vl")
    model(**tiny_inputs.with_grid(model, rows=2))
    before = model.model.rope_deltas
    with pytest.raises(KeyboardInterrupt), undisturbed(model):
        model(**tiny_inputs.with_grid(model))
        raise KeyboardInterrupt
    assert model.model.rope_deltas is before


class Remembering(torch.nn.Module):
    """A model that keeps something of its inputs in every way."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(2))
        self.calls, self.rope_deltas = 0, torch.ones(1)

    def forward(self, x):
        self.register_buffer("table", x)
        self.calls, self.last, self.rope_deltas = self.calls + 1, x, x


def test_all_that_a_model_remembers_comes_back():
    model = Remembering()
    before = dict(vars(model)), model.table
    with undisturbed(model):
        assert model.rope_deltas is None, "as if it had read nothing"
        model(torch.rand(3))
        assert model.calls == 1 and model.table is model.last
    assert vars(model).keys() == before[0].keys() and all(vars(model)[name] is before[0][name] for name in before[0])
    assert model.table is before[1]


@torch.no_grad()
def test_state_of_the_code_itself_stays():
    model = build("image-text", "llava")
    inputs = tiny_inputs.with_pixels(model, 16)
    first = Inference(model, inputs).forward(inputs)
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    assert hooks > 0  # transformers installs them once, with the first picture
    assert torch.equal(Inference(model, inputs).forward(inputs), first)
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks


def test_modules_that_a_model_replaces_come_back():
    model = build("encoder-decoder", "bigbird_pegasus")  # text shorter than its blocks gets another kind of attention
    before = [(name, module, vars(module).get("attention_type")) for name, module in model.named_modules()]
    Inference(model).decode(token_ids(1, 9), 4)
    assert [(name, module, vars(module).get("attention_type")) for name, module in model.named_modules()] == before
    model(input_ids=token_ids(1, 9), decoder_input_ids=token_ids(1, 9))
    assert [module for _, module in model.named_modules()] != [module for _, module, _ in before]


@pytest.mark.parametrize("model_type", ["blip-2", "instructblip"])
@torch.no_grad()
def test_text_alone_runs_the_inner_language_model(model_type):
    model, ids = build("image-text", model_type), token_ids(2, 12)
    run = Inference(model)
    assert run.target is model.language_model
    assert distance(run.decode(ids, 12)[:, 0], model.language_model(input_ids=ids).logits[:, -1]) < TOLERANCE


@pytest.mark.parametrize(
    ("kind", "model_type", "words"),
    [
        ("speech", "whisper", r"WhisperForConditionalGeneration.*its encoder reads input_features"),
        ("image-text", "vision-encoder-decoder", "its encoder reads pixel_values"),
        ("image-text", "blip", "missing 1 required positional argument: 'pixel_values'"),
        ("image-text", "idefics", "Exactly 1 of pixel_values"),
        ("causal", "musicgen", r"input_ids \[1, 4\].*shape"),
        ("image-text", "diffusion_gemma", "not one row for each token"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(kind, model_type, words):
    with pytest.raises(UnsupportedModelError, match=words) as refusal:
        Inference(build(kind, model_type))
    assert "dictionaries" in refusal.value.remedy


def test_a_dictionary_without_tokens_is_refused():
    run = Inference(build("causal", "llama"))
    with pytest.raises(UnsupportedModelError, match="no input_ids among"):
        run.forward({"pixel_values": torch.zeros(1, 3, 8, 8)})
    with pytest.raises(UnsupportedModelError, match=r"IndexError: index out of range"):
        run.forward(torch.tensor([[400]]))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), HastenError("a kernel"), KeyboardInterrupt()])
def test_errors_that_are_not_the_model_s_pass(error, monkeypatch):
    model = build("causal", "llama")
    run = Inference(model)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(model.model, "forward", fail)
    with pytest.raises(type(error)) as caught:
        run.forward(token_ids(1, 8))
    assert caught.value is error


@pytest.mark.parametrize("positions", [1, 4, 24])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_models_of_few_positions(model_type, positions):
    config = build("causal", model_type).config
    config.max_position_embeddings = positions
    torch.manual_seed(0)
    model = type(build("causal", model_type))(config).eval()
    run, ids = Inference(model), token_ids(1, positions)
    assert run.decode(ids, max(1, positions // 2)).isfinite().all()


def test_prompts_come_from_a_seed_or_are_the_example():
    run = Inference(build("causal", "llama"))
    assert torch.equal(run.prompt(9, 2), run.prompt(9, 2))
    assert run.prompt(9, 2).shape == (2, 9) and run.prompt(500).max() < 320
    model = build("image-text", "llava")
    picture = tiny_inputs.with_pixels(model, 16)
    run = Inference(model, picture)
    assert torch.equal(run.prompt(9)["input_ids"], picture["input_ids"][:, :20])
    longer, ids = run.prompt(50, 3), picture["input_ids"][0]
    assert all(torch.equal(row, torch.cat([ids, ids[20:30]])) for row in longer["input_ids"])
    assert longer["attention_mask"].shape == (3, 50) and len(longer["pixel_values"]) == 3
    assert run.prefill(longer)[0].shape[:2] == (3, 50)


@pytest.mark.parametrize("model_type", ["t5", "bart", "mbart", "whisper"])
@torch.no_grad()
def test_labels_are_read_as_the_models_own_forward_reads_them(model_type):
    """Moved on by one, behind the token that begins."""
    model = build("speech" if model_type == "whisper" else "encoder-decoder", model_type)
    model.config.decoder_start_token_id = 1
    if model_type == "whisper":
        given = tiny_inputs.for_whisper(model, rows=2)
    else:
        given = {"input_ids": token_ids(2, 12) % 80, "labels": token_ids(2, 9, seed=1) % 80 + 3}
        given["labels"][1, 6:] = -100
    run = Inference(model, {name: value[:1] for name, value in given.items()})
    expected = model(**given).logits[0]
    assert distance(run.prefill(given)[0][0], expected) < TOLERANCE
    assert distance(run.decode({name: value[:1] for name, value in given.items()}, 3)[0], expected[2:]) < 1e-4
