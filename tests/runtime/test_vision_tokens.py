"""Vision-token pruning on every family: what is dropped is what an unmodified model of full length cannot see."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import tiny_models
import torch
import vision_models
from masked_tokens import masked
from snapshots import assert_unchanged, snapshot
from torch import nn
from vision_models import FAMILIES, IMAGE, LAYERS, VIDEO, inputs

import hasten
from hasten.acceleration.anatomy import Anatomy
from hasten.acceleration.shortened_masks import cut_mask
from hasten.acceleration.techniques import vision_token_layers
from hasten.bench.runtime import tiny_zoo
from hasten.errors import UnsupportedModelError

STEPS = 12
LIMIT = 1e-4  # of logits, in float32
ONE, PADDED = [[5, "image", 7]], [[4, "image", 3, "image", 6], [2, "image", 5]]
VIDEOS = [[3, "video", 4, "image", 3], [5, "video", 2]]
STAGES = ({2: 0.5}, {1: 0.5, 3: 0.25, 5: 0.1})
DEEP = ({2: 0.5}, {2: 0.5, 4: 0.25})  # of decoders that get features of the image until layer 2


@cache
def model_of(name: str) -> nn.Module:
    return vision_models.build(name)


def accelerated(model: nn.Module, stages: dict[int, float], **fields):
    technique = hasten.VisionTokens(stages, **fields)
    return hasten.accelerated(model, technique, measure_speed=False, measure_drift=False)


def reference(model: nn.Module, stages: dict[int, float], asks: str = "last"):
    return masked(model, stages, (IMAGE, VIDEO), asks)


def generate(model: nn.Module, given: vision_models.Inputs, steps: int = STEPS, **settings):
    settings = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True} | settings
    return model.generate(**given, max_new_tokens=steps, **settings)


def distance(one, other) -> float:
    """The largest distance of the logits of two runs of `generate`."""
    return max(float((a - b).abs().max()) for a, b in zip(one.logits, other.logits, strict=True))


def assert_alike(found, expected) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    assert distance(found, expected) < LIMIT


def lengths(output) -> list[int]:
    return [layer.keys.shape[-2] for layer in output.past_key_values.layers]


def prompts(name: str) -> list[list]:
    return [ONE, PADDED] + ([VIDEOS] if "video" in FAMILIES[name].pieces else [])


CASES = [(name, stages) for name in FAMILIES for stages in (STAGES if FAMILIES[name].first == 1 else DEEP)]


@pytest.mark.parametrize(("name", "stages"), CASES, ids=lambda value: str(value))
def test_what_is_dropped_is_what_is_masked(name, stages):
    model = model_of(name)
    given = [inputs(name, model, rows) for rows in prompts(name)]
    with reference(model, stages) as definition:
        expected = [generate(model, each) for each in given]
    dense = [generate(model, each, steps=1) for each in given]
    with accelerated(model, stages):
        found = [generate(model, each) for each in given]
    for each, wanted in zip(found, expected, strict=True):
        assert_alike(each, wanted)
    assert all(float((a.logits[0] - b.logits[0]).abs().max()) > 0.1 for a, b in zip(dense, expected, strict=True))
    assert [each.keys() for each in definition.kept] == [stages.keys()] * len(given)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_does_not_depend_on_its_batch(name):
    model = model_of(name)
    with accelerated(model, DEEP[1]):
        together = generate(model, inputs(name, model, PADDED), 3)
        alone = [generate(model, inputs(name, model, [row]), 3) for row in PADDED]
    for row, own in enumerate(alone):
        for logits, expected in zip(together.logits, own.logits, strict=True):
            assert float((logits[row] - expected[0]).abs().max()) < LIMIT


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_the_cache_holds_what_is_kept(name):
    model, given = model_of(name), inputs(name, model_of(name), ONE)
    images = int((given["input_ids"] == IMAGE).sum())
    with accelerated(model, DEEP[1]):
        found = lengths(generate(model, given, 2))
    tokens = given["input_ids"].shape[1] + 1
    left = [tokens] * 2 + [tokens - images + -(-images // 2)] * 2 + [tokens - images + -(-images // 4)] * 2
    window = vision_models.WINDOW - 1 if name == "gemma3" else tokens
    sliding = [name == "gemma3" and layer % 2 == 0 for layer in range(LAYERS)]
    assert found == [min(window, size) if slides else size for size, slides in zip(left, sliding, strict=True)]


@pytest.mark.parametrize(
    "fields", [{"score": "random"}, {"score": "text_raters"}, {"score": "vision"}, {"mode": "merge"}], ids=str
)
@pytest.mark.parametrize("name", ["llava", "gemma3"])
@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch_whatever_ranks(name, fields):
    model = model_of(name)
    technique, example = hasten.VisionTokens(STAGES[1], **fields), inputs(name, model, ONE)
    with hasten.accelerated(model, technique, calibration=[example], measure_speed=False, measure_drift=False):
        together = model(**inputs(name, model, PADDED)).logits[:, -1]
        alone = torch.cat([model(**inputs(name, model, [row])).logits[:, -1] for row in PADDED])
    assert float((together - alone).abs().max()) < LIMIT


def test_layers_of_one_stage_share_their_masks(monkeypatch):
    model, made = model_of("llava"), []

    def counted(*arguments):
        made.append(arguments)
        return cut_mask(*arguments)

    with accelerated(model, STAGES[1]):
        monkeypatch.setattr(vision_token_layers, "cut_mask", counted)
        generate(model, inputs("llava", model, PADDED), 4)
    assert len(made) == 4 * len(STAGES[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_without_a_drop_or_without_an_image_nothing_changes_by_a_bit(name):
    model = model_of(name)
    given, text = inputs(name, model, PADDED), inputs(name, model, [[19], [11]])
    dense = [generate(model, given, 3), generate(model, text, 3)]
    with accelerated(model, {2: 1.0}):
        found = generate(model, given, 3)
    with accelerated(model, DEEP[0]):
        plain = generate(model, text, 3)
    for one, other in zip((found, plain), dense, strict=True):
        assert torch.equal(one.sequences, other.sequences) and distance(one, other) == 0


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "paligemma", "gemma3"])
def test_attention_functions(name, attention):
    model = vision_models.build(name)
    model.set_attn_implementation(attention)
    for rows in (ONE, PADDED):
        given = inputs(name, model, rows)
        with reference(model, STAGES[1]):
            expected = generate(model, given, 3)
        with accelerated(model, STAGES[1]):
            assert_alike(generate(model, given, 3), expected)


@pytest.mark.parametrize("name", ["llava", "idefics3", "gemma3"])
@torch.no_grad()
def test_padding_on_the_right(name):
    model = model_of(name)
    given = inputs(name, model, PADDED)
    lengths, width = given["attention_mask"].sum(1).tolist(), given["input_ids"].shape[1]
    for key in {"input_ids", "attention_mask", "token_type_ids"} & given.keys():
        given[key] = torch.stack([row.roll(length) for row, length in zip(given[key], lengths, strict=True)])
    assert lengths[1] < width and given["attention_mask"][1, -1] == 0
    with reference(model, STAGES[1]) as definition:
        expected = model(**given).logits
    with accelerated(model, STAGES[1]):
        found = model(**given).logits
    for row, length in enumerate(lengths):
        assert float((found[row, length - 1] - expected[row, length - 1]).abs().max()) < LIMIT
        seen = ~definition.hidden[LAYERS - 1][row, :length]
        assert torch.equal(found[row, :length].isfinite().all(-1), seen)
        assert float((found[row, :length] - expected[row, :length])[seen].abs().max()) < LIMIT


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
def test_beams(name):
    model = model_of(name)
    given = inputs(name, model, PADDED)
    with reference(model, STAGES[1]):
        expected = generate(model, given, 6, num_beams=3, num_return_sequences=2, output_scores=True)
    with accelerated(model, STAGES[1]):
        found = generate(model, given, 6, num_beams=3, num_return_sequences=2, output_scores=True)
    assert_alike(found, expected)
    assert torch.allclose(found.sequences_scores, expected.sequences_scores, atol=LIMIT)


def test_samples():
    model, settings = model_of("llava"), {"do_sample": True, "num_return_sequences": 3}
    given = inputs("llava", model, PADDED)
    with reference(model, STAGES[0]):
        torch.manual_seed(1)
        expected = generate(model, given, 6, **settings)
    with accelerated(model, STAGES[0]):
        torch.manual_seed(1)
        found = generate(model, given, 6, **settings)
    assert_alike(found, expected)


def follow(model: nn.Module, name: str, turns: list[list[list]]) -> list:
    """What a model says in each turn of a conversation on one cache: the rows of a turn begin with those of the turn
    before, and what was said stands between these and what is new."""
    cache, earlier, past, outputs = None, [0] * len(turns[0]), {}, []
    for rows in turns:
        given = inputs(name, model, [row[first:] for row, first in zip(rows, earlier, strict=True)])
        for key in past:
            given[key] = torch.cat([past[key], given[key]], 1)
        outputs.append(generate(model, given, 4, past_key_values=cache))
        said = outputs[-1].sequences
        cache, earlier = outputs[-1].past_key_values, [len(row) for row in rows]
        for key in {"attention_mask", "token_type_ids", "mm_token_type_ids"} & given.keys():
            value = 1 if key == "attention_mask" else 0
            past[key] = nn.functional.pad(given[key], (0, said.shape[1] - given[key].shape[1]), value=value)
        past["input_ids"] = said
    return outputs


TURNS = {
    "text": [[[4, "image", 5]], [[4, "image", 5, 6]]],
    "rows": [PADDED, [[*PADDED[0], 4], [*PADDED[1], 4]]],
    "an image": [[[4, "image", 5]], [[4, "image", 5, 3, "image", 4]]],
    "an image after text": [[[14]], [[14, 3, "image", 4]], [[14, 3, "image", 4, 5]]],
}


@pytest.mark.parametrize(
    ("name", "turns"),
    # Qwen2.5-VL's own generate cannot be given a second image on a cache.
    [*((name, turns) for name in ("llava", "idefics3") for turns in TURNS), ("qwen2_5_vl", "text"), ("gemma3", "rows")],
)
def test_turns_on_one_cache(name, turns):
    model = model_of(name)
    with reference(model, STAGES[1]):
        expected = follow(model, name, TURNS[turns])
    with accelerated(model, STAGES[1]):
        found = follow(model, name, TURNS[turns])
    for turn, wanted in zip(found, expected, strict=True):
        assert_alike(turn, wanted)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "paligemma", "gemma3"])
def test_per_turn_keeps_the_same_tokens_whatever_is_asked(name):
    model, kept = model_of(name), []
    for question in (torch.arange(20, 27), torch.arange(47, 40, -1)):
        given = inputs(name, model, ONE)
        given["input_ids"][:, -7:] = question
        with reference(model, STAGES[1], asks="image") as definition:
            expected = generate(model, given, 3)
        with accelerated(model, STAGES[1], when="per_turn"):
            assert_alike(generate(model, given, 3), expected)
        kept.append(definition.kept)
    if name != "paligemma":  # whose prompts are read in both directions
        assert kept[0] == kept[1]


@pytest.mark.parametrize("size", [8, 24, 64])
def test_prefill_in_chunks(size):
    """A chunk is a pass of its own: its last token ranks its image tokens."""
    model = model_of("llava")
    given = inputs("llava", model, [[26, "image", 26]])
    with reference(model, STAGES[1]):
        expected = generate(model, given, 4, prefill_chunk_size=size)
    with accelerated(model, STAGES[1]):
        assert_alike(generate(model, given, 4, prefill_chunk_size=size), expected)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
def test_prompt_lookup_says_what_greedy_decoding_says(name):
    model = model_of(name)
    given = inputs(name, model, ONE)
    repeated = given["input_ids"][0, -4:]
    given["input_ids"][0, :4] = repeated  # so that there is something to look up: what follows runs into the image
    with accelerated(model, STAGES[1]):
        plain = model.generate(**given, max_new_tokens=STEPS, do_sample=False)
        looked_up = model.generate(**given, max_new_tokens=STEPS, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(looked_up, plain)


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_without_a_cache(name):
    model = model_of(name)
    given = inputs(name, model, PADDED)
    with reference(model, STAGES[1]):
        expected = generate(model, given, 3, use_cache=False)
    with accelerated(model, STAGES[1]):
        assert_alike(generate(model, given, 3, use_cache=False), expected)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_bfloat16(name):
    """What is kept is ranked by rounded attention, so that the definition is computed with the same rounding."""
    model = vision_models.build(name).to(torch.bfloat16)
    given = {
        key: value.bfloat16() if value.is_floating_point() else value
        for key, value in inputs(name, model, PADDED).items()
    }
    with reference(model, DEEP[1]) as definition:
        expected = generate(model, given, 1)
    with accelerated(model, DEEP[1]):
        found = generate(model, given, 1)
    assert definition.kept
    norm = expected.logits[0].float().norm()
    assert float((found.logits[0].float() - expected.logits[0].float()).norm() / norm) < 3e-2


WRONG = {
    "inputs_embeds": (
        lambda given: {"inputs_embeds": torch.zeros(1, 9, vision_models.WIDTH)},
        r"inputs_embeds \[1, 9, 32\]",
    ),
    "labels": (lambda given: given | {"labels": given["input_ids"]}, "labels: tokens that were dropped"),
    "output_attentions": (lambda given: given | {"output_attentions": True}, "output_attentions: layers after a drop"),
    "output_hidden_states": (
        lambda given: given | {"output_hidden_states": True},
        "output_hidden_states: layers after",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
@torch.no_grad()
def test_what_cannot_be_done_is_refused_before_anything_runs(wrong):
    model = vision_models.build("llava")
    given, (make, message) = inputs("llava", model, ONE), WRONG[wrong]
    dense = model(**given).logits
    before = snapshot(model)
    with accelerated(model, STAGES[1]):
        expected = generate(model, given, 2)
        with pytest.raises(ValueError, match=message):
            model(**make(given))
        again = generate(model, given, 2)
    assert distance(again, expected) == 0
    assert_unchanged(model, before)
    assert torch.equal(model(**given).logits, dense)


@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
def test_outputs_that_the_configuration_asks_for_are_refused(name):
    model = vision_models.build("llava")
    model.set_attn_implementation("eager")
    given = inputs("llava", model, ONE)
    with accelerated(model, STAGES[1]):
        for config in (model.config, model.config.text_config):
            setattr(config, name, True)
            with pytest.raises(ValueError, match=f"{name}: layers after a drop"):
                model(**given)
            setattr(config, name, False)


@pytest.mark.parametrize("implementation", ["static", "quantized"])
def test_other_caches(implementation):
    """What has no entries that can be left out is refused by its name."""
    model = model_of("llava")
    given = inputs("llava", model, ONE)
    with accelerated(model, STAGES[1]):
        expected = generate(model, given, 3)
        with pytest.raises((ValueError, ImportError, RuntimeError), match=r"Cache|quanto"):
            generate(model, given, 3, cache_implementation=implementation)
        assert distance(generate(model, given, 3), expected) == 0


def test_an_error_inside_a_pass_leaves_nothing_behind():
    model = vision_models.build("llava")
    given = inputs("llava", model, ONE)
    text = {key: value[:, -6:] for key, value in given.items() if key != "pixel_values"}
    with accelerated(model, STAGES[1]):
        expected = [generate(model, each, 2) for each in (given, text)]
        for layer in (0, 3, LAYERS - 1):
            handle = model.get_decoder().layers[layer].mlp.register_forward_pre_hook(fail)
            with pytest.raises(ArithmeticError):
                generate(model, given, 2)
            handle.remove()
            for each, wanted in zip((given, text), expected, strict=True):
                assert distance(generate(model, each, 2), wanted) == 0


def fail(*_):
    raise ArithmeticError


@pytest.mark.parametrize(
    ("name", "stages", "error", "message"),
    [
        ("llava", {LAYERS: 0.5}, ValueError, "layer 6 is none of the model's 6 layers"),
        ("llava", {2: 0.5, 9: 0.25}, ValueError, "layer 9 is none"),
        ("qwen3_vl", {1: 0.5}, UnsupportedModelError, r"layers\.1 .*: features of the image.*; drop from layer 2 on"),
        ("qwen3_vl", {1: 1.0, 2: 0.5}, None, ""),
    ],
)
def test_layers_before_which_nothing_can_be_dropped(name, stages, error, message):
    model = vision_models.build(name)
    before = snapshot(model)
    if error is None:
        with accelerated(model, stages):
            pass
    else:
        with pytest.raises(error, match=message), accelerated(model, stages):
            pass
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({0: 0.5}, "a layer from 1 on"),
        ({2: 0.25, 4: 0.5}, "must not increase with depth"),
        ({2: 0.0}, r"in \(0, 1\], got 0.0"),
        ({2: -0.5}, r"in \(0, 1\], got -0.5"),
        ({2: 1.5}, r"in \(0, 1\], got 1.5"),
        ({}, "empty"),
    ],
)
def test_schedules_that_are_none(stages, message):
    with pytest.raises(ValueError, match=message):
        hasten.VisionTokens(stages)


def test_a_model_of_text_alone_is_refused():
    model = tiny_models.build("llama")
    with pytest.raises(
        UnsupportedModelError, match=r"LlamaForCausalLM.*names no token in place of which an image stands"
    ):
        hasten.accelerate(model, hasten.VisionTokens({1: 0.5}), measure_speed=False)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_attention_that_cannot_leave_out_tokens_is_refused(attention):
    """Of flash attention a window counts entries, not tokens; flex attention takes masks of its own."""
    model = vision_models.build("gemma3")
    model.config.text_config._attn_implementation_internal = attention
    with pytest.raises(UnsupportedModelError, match=rf"layers\.[12] .*{attention}.*attn_implementation='sdpa'"):
        hasten.VisionTokens({2: 0.5}).targets(Anatomy(model))


def test_keys_of_an_earlier_layer_are_refused():
    model = vision_models.build("gemma3")
    model.get_decoder().layers[4].self_attn.is_kv_shared_layer = True
    with pytest.raises(UnsupportedModelError, match=r"layers\.4 .*self_attn attends to the keys of an earlier layer"):
        hasten.VisionTokens({2: 0.5}).targets(Anatomy(model))


def test_two_threads_do_not_see_each_other():
    model = model_of("llava")
    given = [inputs("llava", model, rows) for rows in (ONE, PADDED, [[30]], [[2, "image", 2, "image", 9]])]
    with accelerated(model, STAGES[1]):
        alone = [generate(model, each, 6) for each in given]
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(lambda each: generate(model, each, 6), given * 2))
    for found, expected in zip(together, alone * 2, strict=True):
        assert torch.equal(found.sequences, expected.sequences) and distance(found, expected) == 0


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_of_an_accelerated_model(copied):
    model = vision_models.build("qwen2_vl")
    given = inputs("qwen2_vl", model, PADDED)
    dense = generate(model, given, 3)
    with accelerated(model, STAGES[1]):
        expected = generate(model, given, 3)
        other = copied(model)
    assert distance(generate(model, given, 3), dense) == 0
    assert distance(generate(other, given, 3), expected) == 0
    hasten.revert(other)
    assert distance(generate(other, given, 3), dense) == 0


@pytest.mark.parametrize(
    ("model_type", "stages", "message"),
    [
        ("qwen3_5", {1: 0.5}, r"layers\.[0-9]+ .*conv1d mixes each token"),
        ("lfm2_vl", {1: 0.5}, r"layers\.[0-9]+ .*conv mixes each token"),
        ("mllama", {1: 0.5}, r"layers\.[0-9]+ .*cross_attn attends to the image"),
    ],
)
def test_layers_that_cannot_do_without_tokens_are_refused(model_type, stages, message):
    model = tiny_zoo.build("image-text", model_type)
    with pytest.raises(UnsupportedModelError, match=message):
        hasten.VisionTokens(stages).targets(Anatomy(model))
