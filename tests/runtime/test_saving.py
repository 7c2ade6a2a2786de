import dataclasses
import errno
import functools
import hashlib
import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import transformers
from damage import contents, reseal
from tiny_models import GROUPED, build, token_ids

import hasten
from hasten.acceleration import checksums
from hasten.acceleration.edits import ReplaceForward
from hasten.acceleration.forwards import Forward
from hasten.acceleration.inference import Inference
from hasten.acceleration.techniques import Settings, Technique

EVERYWHERE = hasten.DenseDecode(always=True)  # so that no choice depends on measured time
PLANS = {
    "dense": [EVERYWHERE],
    "wina": [hasten.Wina(0.5), EVERYWHERE],
    "teal-mapping": [hasten.Teal({"*.self_attn.*": 0.3}), EVERYWHERE],
    "cats": [hasten.Cats(0.5), EVERYWHERE],
    "cats-and-wina": [hasten.Cats(0.5), hasten.Wina({"*.self_attn.*": 0.4}), EVERYWHERE],
}


def accelerate(model, plan, calibration=None, **settings):
    calibration = token_ids(seed=1) if calibration is None else calibration
    return hasten.accelerate(model, plan, calibration=calibration, measure_speed=False, measure_drift=False, **settings)


def saved(folder, name="llama", plan="wina"):
    model = build(name)
    accelerate(model, PLANS[plan])
    hasten.save(model, folder)
    return model


def decoded(model, inputs=None, prefix=8):
    """Logits of a prefill and of decode steps."""
    inputs = token_ids()[0, :24] if inputs is None else inputs
    return Inference(model, inputs).decode(inputs, prefix)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_loaded_model_is_the_one_that_was_saved(tmp_path, dtype, plan):
    model = build("llama", dtype)
    accelerate(model, PLANS[plan])
    hasten.save(model, tmp_path)
    loaded = hasten.load(tmp_path)
    assert type(loaded) is type(model) and not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert (loaded._hasten.settings, loaded._hasten.plan) == (model._hasten.settings, model._hasten.plan)
    assert torch.equal(decoded(loaded), decoded(model))
    hasten.revert(loaded)
    hasten.revert(model)
    for (name, ours), (_, theirs) in zip(
        [*loaded.named_parameters(), *loaded.named_buffers()],
        [*model.named_parameters(), *model.named_buffers()],
        strict=True,
    ):
        assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride() and torch.equal(ours, theirs), name


def t5():
    config = transformers.T5Config(
        vocab_size=300, d_model=64, d_ff=128, num_layers=2, num_heads=4, d_kv=16, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def gpt_oss():
    sizes = GROUPED | {"num_key_value_heads": 2, "head_dim": 16}
    return transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)
    )


def bart():
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 128))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(vocab_size=300, d_model=64, **sizes, **heads)
    )


@pytest.mark.parametrize("technique", [hasten.Wina(0.5), None], ids=["wina", "dense"])
@pytest.mark.parametrize(
    "make",
    [t5, bart, gpt_oss, *(functools.partial(build, name) for name in ("llama-tied", "mixtral", "opt", "gemma2"))],
    ids=["t5", "bart", "gpt-oss", "tied", "mixtral", "opt", "gemma2"],
)
def test_models_of_every_kind(tmp_path, make, technique):
    """Encoder-decoders, mixtures of experts, tied heads; and what transformers would keep in float32."""
    model = make().to(torch.float16).eval()
    accelerate(model, [technique, EVERYWHERE] if technique else EVERYWHERE)
    hasten.save(model, tmp_path)
    loaded = hasten.load(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(decoded(loaded), decoded(model))


def test_a_model_that_was_examined_with_pictures(tmp_path):
    """Of the pictures only sizes and shuffled values are kept, so that the loaded model is examined alike."""
    model = build("llava")
    image = torch.cat([torch.full((1, 4), 299), token_ids(1, 20)], 1)
    inputs = {"input_ids": image, "pixel_values": torch.randn(1, 3, 28, 28)}
    accelerate(model, PLANS["wina"], calibration=[inputs])
    hasten.save(model, tmp_path / "first")
    loaded = hasten.load(tmp_path / "first")
    assert torch.equal(decoded(loaded, inputs), decoded(model, inputs))
    kept = loaded._hasten.example["pixel_values"]
    assert kept.shape == inputs["pixel_values"].shape and not torch.equal(kept, inputs["pixel_values"])
    assert torch.equal(kept.flatten().sort().values, inputs["pixel_values"].flatten().sort().values)
    hasten.save(loaded, tmp_path / "second")
    assert (
        hasten.load(tmp_path / "second", dtype=torch.bfloat16)._hasten.example["pixel_values"].dtype == torch.bfloat16
    )


def test_weights_that_require_grad(tmp_path):
    model = build("llama").requires_grad_(True)
    accelerate(model, PLANS["wina"])
    hasten.save(model, tmp_path)
    loaded = hasten.load(tmp_path)
    hasten.revert(loaded)
    hasten.revert(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_greedy_allocation_is_saved(tmp_path):
    model = build("llama")
    accelerate(model, [hasten.Wina(0.1, "greedy"), EVERYWHERE], calibration=token_ids(2, 64))
    hasten.save(model, tmp_path)
    assert hasten.load(tmp_path)._hasten.settings == model._hasten.settings


@pytest.mark.parametrize("plan", PLANS)
def test_plain_transformers_loads_the_dense_model(tmp_path, plan):
    model, x = build("llama"), token_ids()
    with torch.no_grad():
        dense = model(x).logits
        accelerate(model, PLANS[plan])
        hasten.save(model, tmp_path)
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
        assert torch.equal(plain(x).logits, dense)


def test_tokenizer_is_saved_along(tmp_path):
    folder = hasten.embedded_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    text = (folder / "heldout.txt").read_text(encoding="utf-8")[:4000]
    accelerate(model, hasten.Teal(0.4), calibration=[text], tokenizer=tokenizer)
    hasten.save(model, tmp_path, tokenizer)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)(text).input_ids == tokenizer(text).input_ids
    ids = tokenizer("def ", return_tensors="pt").input_ids
    assert hasten.load(tmp_path).generate(ids, max_new_tokens=3).shape[1] > 3


def test_saving_what_was_loaded(tmp_path):
    saved(tmp_path / "first", plan="cats-and-wina")
    hasten.save(hasten.load(tmp_path / "first"), tmp_path / "second")
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_a_folder_may_be_moved_and_may_hold_more(tmp_path):
    model = saved(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    for name in ("README.md", "tokenizer.json", ".gitattributes"):
        (tmp_path / "there" / name).write_text("not of the model")
    (tmp_path / "there" / "images").mkdir()
    for place in ("there", "link"):
        assert torch.equal(decoded(hasten.load(tmp_path / place)), decoded(model))


def test_loading_in_another_dtype(tmp_path):
    saved(tmp_path)
    loaded = hasten.load(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32  # as transformers loads a bfloat16 model
    with pytest.raises(ValueError, match="banana"):
        hasten.load(tmp_path, dtype="banana")
    with pytest.raises(ValueError, match="banana"):
        hasten.load(tmp_path, device="banana")


def test_what_was_left_out_stays_left_out(tmp_path):
    """A model with parts that cannot be changed, accelerated without them, loads as it was saved."""
    heads = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}
    experts = {"ffn_hidden_size": 64, "moe_num_experts": 2, "moe_top_k": 1}
    config = transformers.DbrxConfig(
        d_model=64, n_heads=4, n_layers=2, vocab_size=300, max_seq_len=128, attn_config=heads, ffn_config=experts
    )
    model = transformers.DbrxForCausalLM(config).eval()
    with pytest.raises(hasten.UnsupportedModelError, match="experts"):
        accelerate(model, PLANS["wina"])
    accelerate(model, PLANS["wina"], strict=False)
    hasten.save(model, tmp_path / "first")
    loaded = hasten.load(tmp_path / "first")
    assert loaded._hasten.settings == model._hasten.settings
    assert torch.equal(decoded(loaded), decoded(model))
    hasten.save(loaded, tmp_path / "second")
    assert hasten.load(tmp_path / "second")._hasten.settings == model._hasten.settings


class Shifted(Forward):
    def __init__(self, module, name, shift):
        super().__init__(module, name)
        self.shift = shift

    def own(self, x):
        return self.dense(x) + self.shift.to(x.dtype)


@dataclasses.dataclass(frozen=True, slots=True)
class Shift(Technique):
    """A technique that only this test knows, with tensors among its settings."""

    size: float = 0.5
    names: object = None

    exact: ClassVar[bool] = True

    def targets(self, anatomy):
        return tuple(projection.name for projection in anatomy.projections)

    def settle(self, anatomy, statistics):
        tensors = {name: torch.randn(anatomy.model.get_submodule(name).out_features) for name in self.targets(anatomy)}
        return Settings({"size": self.size}, tensors)

    def read(self, saved, anatomy):
        if saved.values != {"size": self.size} or saved.tensors.keys() != set(self.targets(anatomy)):
            raise hasten.SavedPlanError("these are not the settings of Shift")
        return saved

    def edits(self, anatomy, settings):
        return [
            ReplaceForward(name, functools.partial(Shifted, shift=shift * settings.values["size"]))
            for name, shift in settings.tensors.items()
        ]


def test_tensors_among_the_settings(tmp_path):
    model = build("llama")
    hasten.accelerate(model, Shift(0.25), measure_speed=False)
    hasten.save(model, tmp_path)
    loaded = hasten.load(tmp_path)
    assert torch.equal(decoded(loaded), decoded(model))
    assert loaded._hasten.settings["Shift"].tensors.keys() == model._hasten.settings["Shift"].tensors.keys()
    path = tmp_path / "hasten_settings.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(hasten.SavedPlanError, match=r"hasten_settings\.safetensors"):
        hasten.load(tmp_path)
    path.unlink()
    reseal(tmp_path)
    with pytest.raises(hasten.SavedPlanError, match=r"lacks hasten_settings\.safetensors"):
        hasten.load(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), (1, 2), {3: 4}, {1.5}], ids=str)
def test_settings_that_would_not_be_read_back_are_not_saved(tmp_path, value):
    model = build("llama")
    hasten.accelerate(model, Shift(), measure_speed=False)
    model._hasten.settings["Shift"].values["more"] = value
    with pytest.raises(ValueError, match="no plain JSON"):
        hasten.save(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_would_not_be_read_back_is_not_saved(tmp_path):
    model = build("llama")
    hasten.accelerate(model, Shift(names=("a",)), measure_speed=False)
    with pytest.raises(ValueError, match="no plain JSON"):
        hasten.save(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", ["in place", "through .data", "another tensor"])
@pytest.mark.parametrize("plan", ["wina", "cats"])
def test_weights_that_changed_are_not_saved(tmp_path, plan, write):
    model = build("llama")
    accelerate(model, PLANS[plan])
    module = model.model.layers[1].mlp.down_proj
    if write == "in place":
        with torch.no_grad():
            module.weight.mul_(2)
    elif write == "through .data":
        module.weight.data.mul_(2)
    else:
        module.weight = torch.nn.Parameter(module.weight * 2, requires_grad=False)
    with pytest.raises(hasten.StateError, match=r"layers\.1\.mlp\.down_proj\.weight was changed"):
        hasten.save(model, tmp_path)
    assert not list(tmp_path.iterdir())
    hasten.revert(model)


def test_a_forward_that_was_replaced_is_not_saved(tmp_path):
    model = build("llama")
    accelerate(model, EVERYWHERE)
    model.model.layers[0].mlp.up_proj.forward = print
    with pytest.raises(hasten.StateError, match=r"the forward of model\.layers\.0\.mlp\.up_proj was replaced"):
        hasten.save(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_saving_what_is_not_accelerated(tmp_path):
    with pytest.raises(hasten.StateError, match="not accelerated"):
        hasten.save(build("llama"), tmp_path)


def test_classes_that_could_not_be_loaded(tmp_path):
    model = build("llama")
    accelerate(model, EVERYWHERE)
    model._hf_peft_config_loaded = True
    with pytest.raises(hasten.UnsupportedModelError, match="adapters"):
        hasten.save(model, tmp_path)
    model._hf_peft_config_loaded = False
    model.__class__ = type("MyLlama", (type(model),), {})
    with pytest.raises(hasten.UnsupportedModelError, match="MyLlama"):
        hasten.save(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_plan(tmp_path):
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"hasten_plan\.json"):
        hasten.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        hasten.load(tmp_path / "nowhere")


def test_every_byte_of_a_file_counts(tmp_path, monkeypatch):
    """The digest is that of the digests of pieces, of which large files have several."""
    monkeypatch.setattr(checksums, "PIECE", 10)
    data, path = bytes(range(35)), tmp_path / "data"
    path.write_bytes(data)
    pieces = b"".join(hashlib.sha256(data[at : at + 10]).digest() for at in (0, 10, 20, 30))
    digests = {checksums.of_files([path])["data"]}
    assert digests == {hashlib.sha256(pieces).hexdigest()}
    for at in range(35):
        path.write_bytes(data[:at] + b"x" + data[at + 1 :])
        digests |= set(checksums.of_files([path]).values())
    assert len(digests) == 36


def test_models_of_other_names_shapes_or_values_have_other_checksums():
    values = torch.arange(12.0)
    models = [
        torch.nn.ParameterDict(parameters)
        for parameters in (
            {"a": values, "b": values},
            {"a": values, "c": values},
            {"a": values, "b": values.view(3, 4)},
            {"a": values + 1, "b": values},
            {"a": values, "b": values + 1},
        )
    ]
    assert len({checksums.sampled(model) for model in models}) == 5
    columns = torch.nn.ParameterDict({"a": values, "b": values.view(4, 3).t().contiguous().t()})
    assert checksums.sampled(columns) == checksums.sampled(
        torch.nn.ParameterDict({"a": values, "b": values.view(4, 3)})
    )


def edit_plan(folder, change):
    """Changes the plan and seals it anew, as a careless tool might."""
    plan = json.loads((folder / "hasten_plan.json").read_text())
    change(plan)
    (folder / "hasten_plan.json").write_text(json.dumps(plan, indent=2))
    reseal(folder)


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plan: plan.update(version=1), "version 1.*save it again"),
        (lambda plan: plan.update(version=7), "version 7.*update hasten"),
        (lambda plan: plan["settings"].clear(), r"asks for settings of \['Wina'\], saved are those of \[\]"),
        (lambda plan: plan["settings"].update(Cats={}), "Cats"),
        (lambda plan: plan["settings"]["Wina"].pop(UP), "settings of Wina are not those"),
        (lambda plan: plan["settings"]["Wina"][UP].update(sparsity=0.6), "sparsity 0.6"),
        (lambda plan: plan["settings"]["Wina"][UP].update(thresholds=[float("inf")]), "thresholds"),
        (lambda plan: plan["settings"]["Wina"][UP].update(thresholds=[]), "thresholds"),
        (lambda plan: plan["plan"]["techniques"].append({"technique": "Magic"}), "unknown technique 'Magic'"),
        (lambda plan: plan.update(model="MyLlama"), "MyLlama"),
        (lambda plan: plan.update(model="pipeline"), "from_pretrained"),
        (lambda plan: plan.update(checksum=0), "other weights"),
        (lambda plan: plan["files"].pop("model.safetensors"), r"model\.safetensors, which was not saved"),
        (lambda plan: plan["files"].update({"../x": {}}), "not those of one folder"),
        (lambda plan: plan["files"].update({"x.safetensors": {}}), r"lacks x\.safetensors"),
        (lambda plan: plan.pop("plan"), "plan"),
    ],
)
def test_plans_that_do_not_fit(tmp_path, change, words):
    saved(tmp_path)
    edit_plan(tmp_path, change)
    with pytest.raises(hasten.SavedPlanError, match=words):
        hasten.load(tmp_path)


@pytest.mark.parametrize(
    "setting",
    [
        {"sparsity": 0.6},
        {"threshold": float("inf")},
        {"threshold": -0.1},
        {"threshold": 1},
        {"threshold": [0.1]},
        {"thresholds": 0.1},
    ],
    ids=str,
)
def test_settings_of_cats_that_do_not_fit(tmp_path, setting):
    saved(tmp_path, plan="cats")
    edit_plan(tmp_path, lambda plan: plan["settings"]["Cats"]["model.layers.1.mlp"].update(setting))
    with pytest.raises(hasten.SavedPlanError, match=r"model\.layers\.1\.mlp: .*(sparsity|threshold)"):
        hasten.load(tmp_path)


def test_a_plan_that_was_edited(tmp_path):
    saved(tmp_path)
    path = tmp_path / "hasten_plan.json"
    path.write_text(path.read_text().replace('"sparsity": 0.5', '"sparsity": 0.4'))
    with pytest.raises(hasten.SavedPlanError, match=r"hasten_plan\.json is damaged or was edited"):
        hasten.load(tmp_path)


@pytest.mark.parametrize("target", ["/etc/hostname", "../other/model.safetensors"])
def test_links_that_lead_out_of_the_folder(tmp_path, target):
    """Even where they lead to the very file that was saved."""
    saved(tmp_path / "model")
    (tmp_path / "other").mkdir()
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "other" / "model.safetensors")
    (tmp_path / "model" / "model.safetensors").symlink_to(target)
    with pytest.raises(hasten.SavedPlanError, match="leads out of the folder"):
        hasten.load(tmp_path / "model")


@pytest.mark.parametrize("name", ["adapter_config.json", "pytorch_model.bin", "head.safetensors"])
def test_files_that_transformers_would_read_too(tmp_path, name):
    saved(tmp_path)
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(hasten.SavedPlanError, match=f"{name}, which was not saved"):
        hasten.load(tmp_path)


def sharded(model):
    model.save_pretrained = functools.partial(type(model).save_pretrained, model, max_shard_size="200KB")
    return model


def test_saving_again_replaces_what_was_saved(tmp_path):
    """And nothing of it is left: neither shards nor tensors of settings."""
    first = sharded(build("llama"))
    accelerate(first, Shift())
    hasten.save(first, tmp_path)
    (tmp_path / "README.md").write_text("mine")
    assert {"model.safetensors.index.json", "hasten_settings.safetensors"} < contents(tmp_path).keys()
    second = saved(tmp_path, plan="cats")
    names = {"config.json", "generation_config.json", "hasten_plan.json", "model.safetensors", "README.md"}
    assert contents(tmp_path).keys() == names
    assert torch.equal(decoded(hasten.load(tmp_path)), decoded(second))


def test_files_of_another_model_are_not_mixed_in(tmp_path):
    sharded(build("llama")).save_pretrained(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="save to another folder"):
        saved(tmp_path)
    assert contents(tmp_path) == before


def test_a_full_disk_leaves_the_old_folder(tmp_path, monkeypatch):
    saved(tmp_path)
    before = contents(tmp_path)
    model = build("llama", seed=1)
    accelerate(model, PLANS["cats"])

    def full(folder):
        (folder / "config.json").write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        hasten.save(model, tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("step", range(6))
def test_an_interrupted_save_is_never_another_model(tmp_path, monkeypatch, step):
    """Interrupted at any file: what loads is the old model, or nothing; then saving again succeeds."""
    first = sharded(build("llama"))
    accelerate(first, PLANS["wina"])
    hasten.save(first, tmp_path)
    second = build("llama", seed=1)
    accelerate(second, PLANS["cats"])
    steps = iter(range(step))

    def stepping(function):
        def step_or_stop(self, *arguments, **keywords):
            if next(steps, None) is None:
                raise KeyboardInterrupt
            return function(self, *arguments, **keywords)

        return step_or_stop

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", stepping(Path.replace))
        patched.setattr(Path, "unlink", stepping(Path.unlink))
        with pytest.raises(KeyboardInterrupt):
            hasten.save(second, tmp_path)
    try:
        assert torch.equal(decoded(hasten.load(tmp_path)), decoded(first))
    except hasten.SavedPlanError as error:
        assert "damaged" in str(error) or "was not saved" in str(error)
    hasten.save(second, tmp_path)
    assert torch.equal(decoded(hasten.load(tmp_path)), decoded(second))
