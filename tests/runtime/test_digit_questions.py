"""The embedded image-question model: the folder loads, its processor makes the pixels of the training, it answers about
digits that it has never seen and is lost without the picture; and the generator of questions repeats.
"""

import dataclasses
import importlib.util
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

import hasten
from hasten.models.digit_questions import digit_questions
from hasten.models.digit_questions.questions import KINDS, PLACES, ask
from hasten.models.digit_questions.scenes import NOISE, SIDE, draw_scenes, handwritten

pytest.importorskip("sklearn")
FOLDER = hasten.embedded_model("digits-llava")
RECORD = json.loads((FOLDER / "training.json").read_text())


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return LlavaForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).resolve().parents[2] / "bench" / "runtime" / "train_digit_questions.py"
    spec = importlib.util.spec_from_file_location("train_digit_questions", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def replies(model, processor, samples, images):
    inputs = processor(images=images, text=[sample.prompt for sample in samples], padding=True, return_tensors="pt")
    out = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(out, skip_special_tokens=True)


def accuracy(said, samples):
    return sum(reply == sample.answer for reply, sample in zip(said, samples, strict=True)) / len(samples)


def test_the_folder_is_small_and_the_card_tells_what_was_measured():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 10e6
    card = (FOLDER / "README.md").read_text()
    kinds = RECORD["measured"]["kinds"]
    assert set(kinds) == {*KINDS, "all"} and RECORD["run"]["command"] in card.replace("\n  ", " ")
    for kind, row in kinds.items():
        assert row["questions"] >= 1000
        assert f"| {kind} | {row['questions']:,} | {row['accuracy']:.1%} ({row['interval'][0]:.1%} to" in card


def test_a_prompt_has_a_place_for_each_image_token_and_rows_are_padded_on_the_left(model, processor):
    prompts = ["<image>\nwhich digit is top left ?", "<image>\nwhat is the sum of the digits ?"]
    images = [np.zeros((SIDE, SIDE, 3), np.uint8)] * 2
    inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
    tokens = (inputs["input_ids"] == model.config.image_token_id).sum(-1)
    assert tokens.tolist() == [model.config.image_seq_length] * 2
    assert inputs["attention_mask"][0, :2].tolist() == [0, 0] and bool(inputs["attention_mask"][:, 2:].all())
    assert inputs["input_ids"][0, 2] == inputs["input_ids"][1, 0] == processor.tokenizer.bos_token_id


def test_every_word_of_questions_and_answers_is_a_token(processor):
    known = set(processor.tokenizer.get_vocab())
    for sample in digit_questions(200, seed=1):
        assert {*sample.question.split(), *sample.answer.split()} <= known


def test_the_processor_makes_the_pixels_of_the_training(processor, script):
    scenes = draw_scenes(5, np.random.default_rng(0), handwritten(held_out=True))
    pictures = [np.repeat(image[..., None], 3, axis=-1) for image in scenes.images]
    processed = processor(images=pictures, text=["<image>"] * 5, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(processed, script.pixels(scenes.images), rtol=0, atol=1e-6)


def test_a_slot_of_the_training_computes_what_the_question_alone_does(model, processor, script):
    words = script.vocabulary()
    assert processor.tokenizer.get_vocab() == {word: i for i, word in enumerate(words)}
    rng = np.random.default_rng(0)
    scenes = draw_scenes(2, rng, handwritten(held_out=True))
    slots = script.Slots(words, model.config.image_seq_length)
    asked = slots.fill(scenes, rng)
    pixels = script.pixels(scenes.images)
    batch = (pixels, torch.from_numpy(script.centres(scenes)), torch.zeros(2, 10), asked)
    tokens, targets, weights = (part.unflatten(1, (-1, slots.width)) for part in asked[:3])
    image = torch.full((tokens.shape[1], slots.prefix), model.config.image_token_id)
    image[:, 0] = slots.bos
    with torch.no_grad():
        packed = script.losses(model, script.Teachers(), slots, batch)["answer"]
        lost = []
        for row, questions in zip(pixels, tokens, strict=True):
            inputs = {
                "input_ids": torch.cat([image, questions], dim=1),
                "pixel_values": row.expand(len(image), -1, -1, -1),
            }
            logits = model(**inputs).logits[:, slots.prefix :]
            lost.append(torch.nn.functional.cross_entropy(logits.mT, targets[len(lost)], reduction="none"))
    alone = (weights * torch.stack(lost)).sum() / weights.sum()
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)


def test_attention_is_taught_to_look_at_the_digits_that_are_asked_about(model, script):
    rng = np.random.default_rng(1)
    scenes = draw_scenes(2, rng, handwritten(held_out=True))
    slots = script.Slots(script.vocabulary(), model.config.image_seq_length)
    asked = slots.fill(scenes, rng)
    values = torch.from_numpy(script.centres(scenes))
    for s, kind in enumerate(script.SLOTS):
        found = asked.patches[:, s]
        assert (values[found] < 10).all()
        if kind in ("count", "sum"):
            assert torch.equal(found, values < 10)
        elif kind == "place" or (kind == "where" and asked.ends[:, s].all()):
            assert found.sum(-1).tolist() == [1, 1]

    heads = {}
    block = model.model.language_model.layers[1]
    hooks = [
        block.register_forward_pre_hook(lambda _, args, named: heads.update(hidden=args[0]), with_kwargs=True),
        block.self_attn.register_forward_hook(lambda _, args, out: heads.update(shares=out[1])),
    ]
    batch = (script.pixels(scenes.images), values, torch.zeros(2, 10), asked)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        script.losses(model, script.Teachers(), slots, batch)
        taught = script.looking(model.model.language_model, 1, heads["hidden"], slots, asked)
    model.set_attn_implementation("sdpa")
    for hook in hooks:
        hook.remove()
    shares = heads["shares"][torch.arange(2)[:, None], :, asked.ends, : slots.prefix]  # [B, S, heads, 1 + P]
    shares = (shares / shares.sum(-1, keepdim=True)).mean(2)[..., 1:]
    given = asked.patches.any(-1)
    expected = -((shares * asked.patches).sum(-1)[given] + 1e-6).log().mean()
    torch.testing.assert_close(taught, expected, rtol=1e-5, atol=1e-6)


def test_it_answers_about_digits_it_has_never_seen_and_not_without_the_picture(model, processor):
    samples = digit_questions(60, seed=2)
    seen = accuracy(replies(model, processor, samples, [sample.image for sample in samples]), samples)
    black = [np.zeros_like(sample.image) for sample in samples]
    assert seen >= 0.5 and accuracy(replies(model, processor, samples, black), samples) <= 0.3
    kinds = RECORD["measured"]["kinds"]
    assert kinds["all"]["accuracy"] >= 0.6
    assert all(row["black"] <= row["chance"] + 0.05 for row in kinds.values())


def test_questions_repeat_and_do_not_depend_on_how_many_there_are():
    for one, other in zip(digit_questions(10, seed=3), digit_questions(20, seed=3), strict=False):
        first, second = (dataclasses.asdict(sample) for sample in (one, other))
        assert np.array_equal(first.pop("image"), second.pop("image")) and first == second
    images = [digit_questions(1, seed=4, held_out=side)[0].image for side in (True, False)]
    assert not np.array_equal(*images)


def expected(sample):
    asked, values = sample.question.split(), [digit.value for digit in sample.digits]
    if sample.kind == "place":
        return next(str(digit.value) for digit in sample.digits if digit.place == " ".join(asked[3:-1]))
    if sample.kind == "where":
        return next(digit.place for digit in sample.digits if digit.value == int(asked[3]))
    if sample.kind == "count_of":
        return str(values.count(int(asked[2])))
    return str(len(values) if sample.kind == "count" else sum(values))


def test_the_answers_are_those_of_the_digits_in_the_picture():
    for sample in digit_questions(200, seed=5):
        assert sample.answer == expected(sample) and 2 <= len(sample.digits) <= 5
        ground = np.ones((SIDE, SIDE), bool)
        for left, top, right, bottom in (digit.box for digit in sample.digits):
            assert sample.image[top:bottom, left:right].max() > 100
            ground[top:bottom, left:right] = False
        assert sample.image[ground].max() <= NOISE


def test_kinds_take_turns_and_places_are_all_asked_for():
    samples = digit_questions(500, seed=6)
    assert [sample.kind for sample in samples[:10]] == [*KINDS, *KINDS]
    assert set(Counter(sample.answer for sample in samples if sample.kind == "where")) == set(PLACES)


def test_held_out_digits_are_a_fifth_of_each_value_and_none_is_trained_on():
    (train, train_values), (held_out, values) = handwritten(False), handwritten(True)
    assert len(train) + len(held_out) == 1797
    assert np.abs(np.bincount(values) / (np.bincount(values) + np.bincount(train_values)) - 0.2).max() < 0.01
    assert not {digit.tobytes() for digit in train} & {digit.tobytes() for digit in held_out}


def test_a_kind_without_a_question_and_an_unknown_kind():
    twice = np.full(9, -1)
    twice[:2] = 7
    rng = np.random.default_rng(0)
    assert ask("where", twice, rng) is None
    with pytest.raises(ValueError, match="'relation'"):
        ask("relation", twice, rng)
