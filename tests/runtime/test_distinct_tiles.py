"""Distinct tiles: a tower that computes each tile once gives what it gives for all, in order."""

from functools import cache

import pytest
import tiny_models
import torch
import vision_models
from snapshots import assert_unchanged, snapshot
from torch import nn
from torch.utils._pytree import tree_leaves
from vision_models import inputs, noise

import hasten
from hasten.acceleration.anatomy import Anatomy
from hasten.acceleration.techniques.distinct_tiles import DistinctRows
from hasten.errors import UnsupportedModelError

FAMILIES = ("llava", "llava_next", "internvl", "idefics3", "gemma3", "paligemma")
LIMIT = 1e-6  # relative, in float32
ONE, OTHERS = [[5, "image", 7]], [[4, "image", 3, "image", 6], [2, "image", 5]]
SAME = [[4, "image", 5], [5, "image", 4]]  # one picture and two questions
QUIET = {"measure_speed": False, "measure_drift": False}


@cache
def model_of(name: str) -> nn.Module:
    return vision_models.build(name)


def distinct(name: str, model: nn.Module, *techniques: hasten.VisionTokens):
    plan = [hasten.DistinctTiles(), *techniques]
    return hasten.accelerated(model, plan, calibration=inputs(name, model, ONE), **QUIET)


def tower_of(model: nn.Module) -> nn.Module:
    return Anatomy(model).vision_tower.module


@torch.no_grad()
def run(model: nn.Module, given: vision_models.Inputs) -> tuple[torch.Tensor, list, list[int]]:
    """Logits, what the tower returned, and how many tiles its first layer had in each call."""
    tower, outputs, rows = tower_of(model), [], []
    patches = next(module for module in tower.modules() if isinstance(module, nn.Conv2d))
    handles = [
        tower.register_forward_hook(lambda module, x, y: outputs.append(y)),
        patches.register_forward_pre_hook(lambda module, x: rows.append(len(x[0]))),
    ]
    logits = model(**given).logits
    for handle in handles:
        handle.remove()
    return logits, outputs, rows


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def assert_alike(found: list, expected: list) -> None:
    """Outputs of towers: of the same classes, with the same tensors in the same places."""
    for one, other in zip(found, expected, strict=True):
        assert type(one) is type(other) and one.keys() == other.keys()
        for ours, theirs in zip(tree_leaves(one), tree_leaves(other), strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert ours.shape == theirs.shape and distance(ours, theirs) < LIMIT


def blanked(given: vision_models.Inputs) -> vision_models.Inputs:
    """With the first and the last tile of one colour, which is not that of padding."""
    pixels = given["pixel_values"].clone()
    tiles = pixels.view(-1, *pixels.shape[-3:])
    real = tiles.flatten(1).any(1).nonzero().flatten()
    tiles[real[[0, -1]]] = 0.5
    return given | {"pixel_values": pixels}


@pytest.mark.parametrize("name", FAMILIES)
def test_each_tile_is_computed_once(name):
    model = model_of(name)
    cases = [inputs(name, model, SAME), blanked(inputs(name, model, OTHERS))]
    dense = [run(model, given) for given in cases]
    with distinct(name, model):
        found = [run(model, given) for given in cases]
    for (logits, outputs, rows), (expected, theirs, all_rows), left_out in zip(found, dense, (None, 1), strict=True):
        assert distance(logits, expected) < LIMIT
        assert_alike(outputs, theirs)
        assert rows == [all_rows[0] // 2 if left_out is None else all_rows[0] - left_out]


@pytest.mark.parametrize("name", FAMILIES)
def test_where_nothing_is_alike_no_bit_changes(name):
    model = model_of(name)
    cases = [inputs(name, model, rows) for rows in (ONE, OTHERS)] + [{"input_ids": torch.arange(3, 20)[None]}]
    dense = [run(model, given) for given in cases]
    with distinct(name, model):
        found = [run(model, given) for given in cases]
    for (logits, _, rows), (expected, _, all_rows) in zip(found, dense, strict=True):
        assert torch.equal(logits, expected) and rows == all_rows


@pytest.mark.parametrize("name", FAMILIES)
def test_order_is_kept(name):
    model = model_of(name)
    tower, size = tower_of(model), inputs(name, model, ONE)["pixel_values"].shape[-1]
    a, b, c = noise(0, 3, 3, size, size)
    tiles = torch.stack([b, a, b, c, a, b])
    with torch.no_grad():
        expected = tower(pixel_values=tiles, output_hidden_states=True)
        with distinct(name, model):
            found = tower(pixel_values=tiles, output_hidden_states=True)
            listed = tower(tiles, return_dict=False)
    assert expected.hidden_states
    assert_alike([found], [expected])
    assert isinstance(listed, tuple) and distance(listed[0], expected[0]) < LIMIT
    rows = found.last_hidden_state
    assert torch.equal(rows[0], rows[2]) and torch.equal(rows[1], rows[4]) and not torch.equal(rows[0], rows[3])


def test_what_belongs_to_a_tile_makes_it_another():
    """A picture with another mask is another tile; of tiles and masks alike, there is one."""
    model = model_of("idefics3")
    tower, pixels = tower_of(model), noise(0, 1, 3, 32, 32).repeat(4, 1, 1, 1)
    mask = torch.ones(4, 8, 8, dtype=torch.bool)
    mask[2:, 5:] = False
    with torch.no_grad():
        expected = tower(pixel_values=pixels, patch_attention_mask=mask)
        with distinct("idefics3", model):
            rows = []
            handle = tower.post_layernorm.register_forward_pre_hook(lambda module, x: rows.append(len(x[0])))
            found = tower(pixel_values=pixels, patch_attention_mask=mask)
            handle.remove()
    assert rows == [2] and distance(found[0], expected[0]) < LIMIT
    assert not torch.equal(found[0][1], found[0][2])


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("name", ["llava", "llava_next", "idefics3", "gemma3"])
def test_scores_of_the_tower_are_those_of_all_tiles(name, first):
    model = model_of(name)
    pruning = hasten.VisionTokens({2: 0.5}, score="vision")
    cases = [inputs(name, model, SAME), blanked(inputs(name, model, OTHERS))]
    example, settings = inputs(name, model, ONE), {"max_new_tokens": 6, "do_sample": False}
    with hasten.accelerated(model, pruning, calibration=example, **QUIET):
        expected = [(run(model, given), model.generate(**given, **settings)) for given in cases]
    plan = [hasten.DistinctTiles(), pruning]
    with hasten.accelerated(model, plan if first else plan[::-1], calibration=example, **QUIET):
        found = [(run(model, given), model.generate(**given, **settings)) for given in cases]
    for ((logits, _, rows), said), ((theirs, _, all_rows), wanted) in zip(found, expected, strict=True):
        assert sum(rows) < sum(all_rows) and torch.equal(said, wanted)
        assert torch.equal(logits.isnan(), theirs.isnan()), "the same tokens are dropped"
        assert distance(logits.nan_to_num(), theirs.nan_to_num()) < LIMIT


@pytest.mark.parametrize("name", ["llava", "paligemma"])
def test_revert_and_a_saved_folder(name, tmp_path):
    model, given = vision_models.build(name), inputs(name, model_of(name), SAME)
    expected = run(model, given)[0]
    before = snapshot(model)
    report = hasten.accelerate(model, hasten.DistinctTiles(), calibration=inputs(name, model, ONE), **QUIET)
    assert report.techniques[0].edited == [Anatomy(model).vision_tower.name]
    fast, _, rows = run(model, given)
    hasten.save(model, tmp_path)
    hasten.revert(model)
    assert_unchanged(model, before)
    assert torch.equal(run(model, given)[0], expected)
    loaded, _, again = run(hasten.load(tmp_path), given)
    assert torch.equal(loaded, fast) and rows == again == [1]


def test_the_report_measures_questions_about_one_picture():
    model = vision_models.build("llava")
    report = hasten.accelerate(model, hasten.DistinctTiles(), calibration=inputs("llava", model, ONE))
    regimes = [timing.regime for timing in report.techniques[0].timings]
    assert [(regime.batch, regime.image) for regime in regimes] == [(1, 16), (4, 16)]
    assert 0 <= report.self_check < LIMIT


def test_gradients_are_those_of_the_dense_tower():
    model = vision_models.build("llava")
    tower, tiles = tower_of(model), noise(0, 1, 3, 16, 16).repeat(2, 1, 1, 1)
    with distinct("llava", model):
        tower.requires_grad_(True)
        weight = next(tower.parameters())
        (own,) = torch.autograd.grad(tower(tiles).last_hidden_state.sum(), weight)
        tower.requires_grad_(False)
        pixels = tiles.requires_grad_(True)
        (of_pixels,) = torch.autograd.grad(tower(pixels).last_hidden_state.sum(), pixels)
    tower.requires_grad_(True)
    (expected,) = torch.autograd.grad(tower(tiles.detach()).last_hidden_state.sum(), weight)
    assert torch.equal(own, expected)
    assert torch.equal(of_pixels[0], of_pixels[1]) and of_pixels.any()


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_towers_of_packed_patches_are_refused_by_name(name):
    model = vision_models.build(name)
    before = snapshot(model)
    reads = r"model\.visual .*its vision tower reads the patches of all pictures as one sequence"
    with pytest.raises(UnsupportedModelError, match=reads), distinct(name, model):
        pass
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: tiny_models.build("llama"), r"LlamaForCausalLM.*it has no vision tower"),
        (lambda: vision_models.build("llava"), r"examined without a picture.*give calibration= as a dictionary"),
    ],
    ids=["of text", "without an example"],
)
def test_without_a_picture_it_is_refused(build, message):
    with pytest.raises(UnsupportedModelError, match=message):
        hasten.accelerate(build(), hasten.DistinctTiles(), **QUIET)


class Packing(nn.Module):
    """A tower that lays all pictures into one row."""

    def forward(self, pixel_values):
        return pixel_values.flatten(0, 1)


def test_what_has_no_row_for_each_tile_is_refused():
    tower = DistinctRows(Packing(), "tower")
    with pytest.raises(UnsupportedModelError, match=r"tower .*for 1 tiles it returns \[3, 4, 4\], which has no row"):
        tower(torch.ones(2, 3, 4, 4))
    assert tower(torch.arange(96.0).view(2, 3, 4, 4)).shape == (6, 4, 4)
