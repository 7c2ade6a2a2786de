"""Scores and modes of vision-token pruning, against definitions written here."""

import contextlib
import json

import pytest
import torch
import vision_models
from vision_models import FAMILIES, IMAGE, VIDEO, inputs

import hasten
from hasten.acceleration.anatomy import Anatomy
from hasten.acceleration.shortened_cache import ShortenedLayer
from hasten.acceleration.techniques import Settings
from hasten.errors import SavedPlanError, UnsupportedModelError
from hasten.sparsity.vision_tokens import bipartite_merging, text_raters

STAGES = {2: 0.5}
PROMPT = [[5, "image", 7]]


def run(model, given):
    """The logits of the last token of a pass, and the image tokens that its last layer keeps, by row."""
    output = model(**given, use_cache=True)
    layer = output.past_key_values.layers[-1]
    ids = given["input_ids"]
    entries = layer.entries if isinstance(layer, ShortenedLayer) else None
    kept = []
    for row in range(len(ids)):
        images = torch.isin(ids[row], torch.tensor([IMAGE, VIDEO])).nonzero()[:, 0].tolist()
        tokens = images if entries is None else entries.tokens[row][entries.seen()[row]].tolist()
        kept.append([token for token in images if token in tokens])
    return output.logits[:, -1], kept


def accelerated(model, stages, given, **fields):
    technique = hasten.VisionTokens(stages, **fields)
    return hasten.accelerated(model, technique, calibration=given, measure_speed=False, measure_drift=False)


@contextlib.contextmanager
def noted(module, name, notes):
    """Keeps what a hook of the module sees under `name`, its output first."""

    def note(module, arguments, keywords, output):
        notes.setdefault(name, (output, arguments, keywords))

    handle = module.register_forward_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_scores_of_patches_land_on_the_tokens_that_are_made_of_them(name):
    """A patch that the tower's last used layer returns otherwise changes the same tokens that its score goes to."""
    model = vision_models.build(name)
    given = inputs(name, model, [[3, "image", 4]])
    tower, decoder = Anatomy(model).vision_tower, model.get_decoder()
    layer = model.get_submodule(tower.attention.rpartition(".")[0])
    images = torch.isin(given["input_ids"], torch.tensor([IMAGE]))
    shift = None

    def perturb(module, arguments, output):
        hidden = output[0] if isinstance(output, tuple) else output
        if shift is None:
            shapes.append(hidden.shape[:-1])
            return output
        changed = hidden.reshape(-1, hidden.shape[-1]).clone()
        changed[shift] += vision_models.noise(3, hidden.shape[-1])
        changed = changed.view(hidden.shape)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def embeddings():
        notes: dict = {}
        with noted(decoder.layers[0], "layer", notes):
            model(**given)
        _, arguments, keywords = notes["layer"]
        return (arguments[0] if arguments else keywords["hidden_states"])[images]

    shapes: list = []
    handle = layer.register_forward_hook(perturb)
    try:
        plain, shape = embeddings(), None
        shape = shapes[0]
        tiles, patches = shape if len(shape) == 2 else (1, shape[0])
        first = int(tower.class_token)
        tried = range(0, tiles * patches, max(1, tiles * patches // 23))
        for place in tried:
            tile, patch = divmod(place, patches)
            if patch < first:
                continue
            shift = place
            moved = (embeddings() - plain).abs().amax(1) > 1e-4
            scores = torch.zeros(tiles, patches - first)
            scores[tile, patch - first] = 1.0
            scored = tower.of_tokens([scores], int(images.sum()), given) > 0
            assert torch.equal(moved, scored), f"patch {patch} of tile {tile}"
    finally:
        handle.remove()


def tower_weights(model, given):
    """The attention weights [1, H, n, n] of the layer of the tower that ranks, by eager attention."""
    config, notes = model.model.vision_tower.config, {}
    config._attn_implementation = "eager"
    with noted(model.get_submodule(Anatomy(model).vision_tower.attention), "attention", notes):
        model(**given)
    config._attn_implementation = "sdpa"
    return notes["attention"][0][1]


def best(scores, given, count=8):
    """The image tokens whose patches score best, in order."""
    images = (given["input_ids"][0] == IMAGE).nonzero()[:, 0]
    return sorted(images[scores.topk(count).indices].tolist())


@torch.no_grad()
def test_the_class_token_of_the_tower_ranks():
    model = vision_models.build("llava")
    given = inputs("llava", model, PROMPT)
    expected = best(tower_weights(model, given).mean(1)[0, 0, 1:], given)
    for when in ("prompt", "per_turn"):
        with accelerated(model, STAGES, given, score="vision", when=when):
            assert run(model, given)[1] == [expected]


@torch.no_grad()
def test_a_tower_without_a_class_token_ranks_by_its_patches():
    model = vision_models.build("paligemma")
    given = inputs("paligemma", model, PROMPT)
    weights = tower_weights(model, given)  # of fewer patches than are asked, so all of them are
    expected = best(weights.mean((1, 2))[0], given)
    with accelerated(model, STAGES, given, score="vision"):
        assert run(model, given)[1] == [expected]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("llava_onevision", "smolvlm")])
@torch.no_grad()
def test_generate_ranks_by_the_tower_as_a_pass_does(name):
    """It encodes pictures before the pass, once for all beams and samples of a prompt."""
    model = vision_models.build(name)
    rows = [[4, "image", 3, "image", 6], [2, "image", 5]]
    given, alone = inputs(name, model, rows), [inputs(name, model, [row]) for row in rows]
    settings = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
    with accelerated(model, STAGES, alone[0], score="vision"):
        expected = [run(model, each)[1][0] for each in alone]
        together = run(model, given)[1]
        layer = model.generate(**given, **settings).past_key_values.layers[-1]
        samples = settings | {"do_sample": True, "num_return_sequences": 2}
        sampled = model.generate(**given, **samples).past_key_values.layers[-1]
    padding = [(row == vision_models.PAD).sum() for row in given["input_ids"]]
    images = [torch.isin(row, torch.tensor([IMAGE, VIDEO])) for row in given["input_ids"]]
    for row, own in enumerate(expected):
        shifted = [token + int(padding[row]) for token in own]
        assert together[row] == shifted
        for found, entries in ((layer, [row]), (sampled, [2 * row, 2 * row + 1])):
            for entry in entries:
                tokens = found.entries.tokens[entry][found.entries.seen()[entry]]
                tokens = tokens[tokens < len(images[row])]
                assert tokens[images[row][tokens]].tolist() == shifted


def test_the_tower_ranks_pictures_alone():
    model = vision_models.build("llava")
    given = inputs("llava", model, PROMPT)
    with pytest.raises(UnsupportedModelError, match="examined without a picture; give calibration="):
        hasten.accelerate(model, hasten.VisionTokens(STAGES, score="vision"), measure_speed=False)
    without = {name: value for name, value in given.items() if name != "pixel_values"}
    with accelerated(model, STAGES, given, score="vision"):
        with pytest.raises(ValueError, match="score='vision' ranks by the vision tower: give the images"):
            model(**without)
        run(model, given)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
@torch.no_grad()
def test_text_raters(name):
    """The mean attention, in the layer before, of the text tokens that are most alike to the image."""
    model = vision_models.build(name)
    given = inputs(name, model, PROMPT)
    decoder, notes = model.get_decoder(), {}
    decoder.config._attn_implementation = "eager"
    with noted(decoder.layers[0], "first", notes), noted(decoder.layers[1].self_attn, "attention", notes):
        model(**given)
    _, arguments, keywords = notes["first"]
    embedded = arguments[0] if arguments else keywords["hidden_states"]
    images = given["input_ids"] == IMAGE
    raters = text_raters(embedded[images][None], embedded[~images][None])[0]
    rows = (~images[0]).nonzero()[:, 0][raters]
    scores = notes["attention"][0][1][0][:, rows].mean((0, 1))[images[0]]
    places = images[0].nonzero()[:, 0]
    expected = sorted(places[scores.topk(-(-len(places) // 2)).indices].tolist())
    decoder.config._attn_implementation = "sdpa"
    with accelerated(model, STAGES, given, score="text_raters"):
        assert run(model, given)[1] == [expected]


@torch.no_grad()
def test_random_scores_hang_on_tokens_and_seed():
    model = vision_models.build("llava")
    given, other = inputs("llava", model, PROMPT), inputs("llava", model, [[5, "image", 8]])
    kept = {}
    for seed in (0, 1):
        with accelerated(model, STAGES, given, score="random", seed=seed):
            kept[seed] = run(model, given)[1]
            assert run(model, given)[1] == kept[seed]
            assert run(model, other)[1] != kept[seed]
    assert kept[0] != kept[1]


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "paligemma", "internvl"])
@pytest.mark.parametrize("stages", [{2: 0.5}, {2: 0.5, 4: 0.2}], ids=["one", "two"])
@torch.no_grad()
def test_merged_tokens_are_seen_as_all_that_they_were_made_of(name, stages):
    """An unmodified model of full length: before a stage the hidden states of merged tokens are replaced by their
    average, in the place of one of them; the others are masked, and log(size) is added to the logits of that one."""
    model = vision_models.build(name)
    given = inputs(name, model, PROMPT)
    decoder = model.get_decoder()
    images = given["input_ids"][0] == IMAGE
    total, state = int(images.sum()), {"sizes": torch.ones(len(images)), "left": torch.ones(len(images)).bool()}

    def before(index):
        def hook(module, arguments, keywords):
            hidden = arguments[0] if arguments else keywords["hidden_states"]
            sizes, left = state["sizes"], state["left"]
            if index in stages:
                places = left.nonzero()[:, 0]
                count = -(-int(stages[index] * total * 1000) // 1000)
                (merging,) = bipartite_merging(
                    hidden[:, places], count, images[None, places], sizes[None, places].long()
                )
                hidden, new, stay = hidden.clone(), sizes.clone(), torch.zeros_like(left)
                for number, column in enumerate(merging.columns.tolist()):
                    members = places[merging.into == number]
                    place = places[column]
                    weights = sizes[members] / sizes[members].sum()
                    hidden[0, place] = (hidden[0, members] * weights[:, None]).sum(0)
                    new[place], stay[place] = sizes[members].sum(), True
                state["sizes"], state["left"] = new, stay
            if not state["left"].all() or (state["sizes"] != 1).any():
                mask = keywords["attention_mask"]
                bias = torch.where(state["left"], state["sizes"].log(), torch.finfo(mask.dtype).min)
                keywords = keywords | {"attention_mask": (mask + bias).clamp(min=torch.finfo(mask.dtype).min)}
            return (hidden, *arguments[1:]), {k: v for k, v in keywords.items() if k != "hidden_states"}

        return hook

    decoder.config._attn_implementation = "eager"
    handles = [layer.register_forward_pre_hook(before(i), with_kwargs=True) for i, layer in enumerate(decoder.layers)]
    expected = model(**given).logits[:, -1]
    for handle in handles:
        handle.remove()
    decoder.config._attn_implementation = "sdpa"
    with accelerated(model, stages, given, mode="merge") as report:
        found, kept = run(model, given)
        assert "merged by likeness" in str(report)
    assert [len(row) for row in kept] == [int(state["left"][images].sum())]
    assert float((found - expected).abs().max()) < 1e-4
    assert float((found - model(**given).logits[:, -1]).abs().max()) > 1e-2


def test_merging_is_refused_under_flash_attention():
    model = vision_models.build("llava")
    model.get_decoder().config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match="mode='merge' adds to the logits of merged tokens"):
        hasten.VisionTokens(STAGES, mode="merge").targets(Anatomy(model))


SCHEDULES = [
    hasten.FastV(2, 0.5),
    hasten.Pyramid(0.5, 3),
    hasten.Stages({1: 0.5, 4: 0.25}),
    hasten.PSigmoid(8.0, 0.4, 0.1),
    hasten.FoundSchedule(((2, 0.5),), 6, "g_search", 0.9, 0.91, 0.6, 16.0, 12, 40),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_schedules_go_with_the_plan(schedule, tmp_path):
    model = vision_models.build("llava")
    given = inputs("llava", model, PROMPT)
    technique = hasten.VisionTokens(schedule, score="last_token", when="per_turn")
    plan = hasten.Plan(technique)
    assert hasten.Plan.from_json(plan.to_json()) == plan
    hasten.accelerate(model, technique, measure_speed=False)
    logits, kept = run(model, given)
    hasten.save(model, tmp_path)
    loaded = hasten.load(tmp_path)
    again, other = run(loaded, given)
    assert torch.equal(again, logits) and other == kept
    saved = json.loads((tmp_path / "hasten_plan.json").read_text())
    assert saved["settings"]["VisionTokens"]["shares"] == list(schedule.shares(6))
    with pytest.raises(SavedPlanError, match="expected the settings"):
        technique.read(Settings({"shares": [1.0] * 6}), Anatomy(model))


def test_a_found_schedule_is_for_its_own_depth():
    with pytest.raises(ValueError, match="searched for a decoder of 6 layers, the model has 4"):
        SCHEDULES[-1].shares(4)


def test_a_found_schedule_draws_itself(tmp_path):
    pytest.importorskip("matplotlib")
    SCHEDULES[-1].plot(tmp_path / "schedule.png")
    assert (tmp_path / "schedule.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"score": "cls"}, "score must be one of 'last_token'.*got 'cls'"),
        ({"mode": "drops"}, "mode must be one of 'drop', 'merge', got 'drops'"),
        ({"when": "turn"}, "when must be one of 'prompt', 'per_turn', got 'turn'"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"score": "text_raters", "when": "per_turn"}, "when='per_turn' ranks without the text"),
        ({"schedule": 0.5}, "a schedule is one such as"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        hasten.VisionTokens(**fields)
