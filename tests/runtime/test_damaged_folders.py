"""Whatever happens to a saved folder, loading it ends in a clear error or gives the very model that was saved."""

import contextlib
import functools

import pytest
import torch
from damage import contents, damages, fields_of, monsters_of, reseal, restore
from tiny_models import build, token_ids

import hasten
from hasten.acceleration.inference import Inference

EVERYWHERE = hasten.DenseDecode(always=True)  # so that no choice depends on measured time
PLANS = {
    "wina": [hasten.Wina(0.5), EVERYWHERE],
    "dense": [EVERYWHERE],
    "cats": [hasten.Cats(0.5), EVERYWHERE],
    "sharded": [hasten.Wina({"*.mlp.*": 0.4}), EVERYWHERE],
}
OTHERS = {"wina": "cats", "dense": "sharded", "cats": "wina", "sharded": "dense"}  # what files are exchanged with


def save(folder, name, seed=0):
    model = build("llama", seed=seed)
    model.config.rms_norm_eps, model.generation_config.max_new_tokens = 1e-5 * (1 + seed), 20 + seed
    hasten.accelerate(model, PLANS[name], calibration=token_ids(seed=1), measure_speed=False, measure_drift=False)
    if name == "sharded":
        model.save_pretrained = functools.partial(model.save_pretrained, max_shard_size="200KB")
    hasten.save(model, folder)
    return contents(folder)


def what_it_is(model):
    """All that can be told of a loaded model: what it computes in prefill and decode, its settings and
    configurations."""
    logits = Inference(model).decode(token_ids()[0, :10], 8)
    installed = model._hasten
    return logits, (installed.plan, installed.settings, model.config.to_dict(), model.generation_config.to_dict())


def outcome(folder, expected):
    """How loading ends: "refused", "harmless", "silent" or the raw error."""
    try:
        model = hasten.load(folder)
    except hasten.SavedPlanError:
        return "refused"
    except FileNotFoundError:
        return "raw FileNotFoundError" if (folder / "hasten_plan.json").is_file() else "refused"
    except Exception as error:
        return f"raw {type(error).__name__}"
    logits, rest = what_it_is(model)
    return "harmless" if torch.equal(logits, expected[0]) and rest == expected[1] else "silent"


@pytest.mark.parametrize("name", PLANS)
def test_damage_is_noticed(tmp_path, name):
    """250 damages each: 1,000 in all, none silent, none that ends in a raw error."""
    files = save(tmp_path / "saved", name)
    others = save(tmp_path / "other", OTHERS[name], seed=1)
    folder = tmp_path / "damaged"
    restore(folder, files)
    expected = what_it_is(hasten.load(folder))
    assert outcome(folder, expected) == "harmless"
    seen = {}
    for damage, apply in damages(files, others, 250, seed=0):
        restore(folder, files)
        apply(folder)
        seen[damage] = outcome(folder, expected)
    assert len(seen) == 250
    assert {damage: end for damage, end in seen.items() if end not in ("refused", "harmless")} == {}
    assert 5 < list(seen.values()).count("harmless") < 50


def test_a_forged_folder_gives_no_raw_error(tmp_path):
    """Digests that were written anew hide a change, but whatever it breaks is said clearly."""
    files = save(tmp_path / "saved", "sharded")
    folder = tmp_path / "forged"
    fields, ends = fields_of(files), {}
    for damage, apply in [*fields[:: len(fields) // 25], *monsters_of(files)]:
        restore(folder, files)
        apply(folder)
        with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):  # a plan that cannot be sealed
            reseal(folder)
        ends[damage] = "loaded"
        try:
            hasten.load(folder)
        except Exception as error:
            ends[damage] = type(error).__name__
    assert set(ends.values()) == {"loaded", "SavedPlanError"}
    assert list(ends.values()).count("SavedPlanError") > 30
    led_away = [
        end for damage, end in ends.items() if damage.startswith("model.safetensors.index.json") and "/" in damage
    ]
    assert led_away and set(led_away) == {"SavedPlanError"}


def test_a_damaged_plan_gives_no_raw_error(tmp_path):
    plan = hasten.Plan([hasten.Wina({"up_proj": 0.25}), hasten.Cats(0.5), EVERYWHERE])
    files, read, refused = {"plan.json": plan.to_json().encode()}, 0, 0
    for damage, apply in [*fields_of(files), *monsters_of(files)]:
        apply(tmp_path)
        try:
            other = hasten.Plan.from_json((tmp_path / "plan.json").read_bytes())
        except Exception as error:
            assert isinstance(error, hasten.SavedPlanError), (damage, error)
            refused += 1
        else:
            assert hasten.Plan.from_json(other.to_json()) == other, damage
            read += 1
    assert refused > 4 * read > 0
