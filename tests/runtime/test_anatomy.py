"""What is found in models of every kind, and what is refused by name."""

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from tiny_models import CONFIGS, MIXTURES, build
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers.pytorch_utils import Conv1D

import hasten
from hasten.acceleration import families
from hasten.acceleration.anatomy import Anatomy
from hasten.acceleration.linear_maps import elsewhere
from hasten.acceleration.parts import Projection
from hasten.bench.runtime import tiny_zoo
from hasten.errors import HastenError


@pytest.fixture
def model():
    return build("llama")


ALL = [("causal", name) for name in tiny_zoo.causal_types() if name not in tiny_zoo.IMPOSSIBLE] + [
    ("image-text", name) for name in tiny_zoo.image_text_types() if name not in tiny_zoo.IMPOSSIBLE
]
# Towers and projectors that a text decoder is beside.
ASIDE = ("vision", "visual", "audio", "image", "tower", "qformer", "protein", "projector")


@pytest.mark.parametrize(("kind", "model_type"), ALL, ids=[f"{kind}-{name}" for kind, name in ALL])
def test_every_type_is_taken_or_refused_by_name(kind, model_type):
    model = tiny_zoo.build(kind, model_type)
    anatomy = Anatomy(model)
    if model_type == "pi0":
        with pytest.raises(hasten.UnsupportedModelError, match="no language-model head"):
            _ = anatomy.head
        return
    assert anatomy.head is None or model.get_submodule(anatomy.head.name) is anatomy.head.module
    names = [projection.name for projection in anatomy.with_shared]
    assert names and len(set(names)) == len(names)
    encoder = {*model.get_encoder().modules()} if model.config.is_encoder_decoder else {}
    for block in anatomy.blocks:
        assert model.get_submodule(block.name) is block.module and block.module not in encoder
        assert not any(word in block.name for word in ASIDE)
        for projection in block.projections:
            assert projection.name.startswith(f"{block.name}.")
            assert model.get_submodule(projection.name) is projection.module
    taken = {projection.module for projection in anatomy.with_shared}
    left = {
        below.rpartition(".")[2]
        for block in anatomy.blocks
        for below, module in block.module.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module not in taken and type(module) in (nn.Linear, Conv1D)
    }
    assert left <= {name for names in families.NEVER_CALLED.values() for name in names}
    _ = anatomy.projections, anatomy.gated_mlps, anatomy.experts
    assert all(refusal.name and refusal.kind and refusal.reason and refusal.remedy for refusal in anatomy.refusals)


# By kind and type: lists of layers, projections, gated MLPs, the class of the experts, the head.
FOUND = {
    ("causal", "gpt2"): (["transformer.h"], 8, 0, None, "lm_head"),
    ("causal", "falcon"): (["transformer.h"], 8, 0, None, "lm_head"),
    ("causal", "bloom"): (["transformer.h"], 8, 0, None, "lm_head"),
    ("causal", "modernbert-decoder"): (["model.layers"], 12, 2, None, "decoder"),
    ("causal", "xlm"): (["transformer.attentions", "transformer.ffns"], 12, 0, None, "pred_layer.proj"),
    ("causal", "hrm_text"): (["model.L_module.layers", "model.H_module.layers"], 32, 4, None, "lm_head"),
    ("causal", "mamba"): (["backbone.layers"], 6, 0, None, "lm_head"),
    ("causal", "mamba2"): (["backbone.layers"], 4, 0, None, "lm_head"),
    ("causal", "falcon_h1"): (["model.layers"], 18, 2, None, "lm_head"),
    ("causal", "qwen3_next"): (["model.layers"], 15, 2, "Qwen3NextExperts", "lm_head"),
    ("causal", "kimi_linear"): (["model.layers"], 31, 3, "KimiLinearExperts", "lm_head"),
    ("causal", "rwkv"): (["rwkv.blocks"], 14, 0, None, "head"),
    ("causal", "xlstm"): (["backbone.blocks"], 20, 2, None, "lm_head"),
    ("causal", "mixtral"): (["model.layers"], 8, 0, "MixtralExperts", "lm_head"),
    ("causal", "gpt_oss"): (["model.layers"], 8, 0, "GptOssExperts", "lm_head"),
    ("causal", "dbrx"): (["transformer.blocks"], 6, 0, "DbrxExperts", "lm_head"),
    ("causal", "deepseek_v3"): (["model.layers"], 16, 2, "DeepseekV3Experts", "lm_head"),
    ("causal", "longcat_flash"): (["model.layers"], 32, 4, "LongcatFlashExperts", "lm_head"),
    ("causal", "inkling_text"): (["model.layers"], 10, 0, "InklingExperts", "lm_head"),
    ("causal", "gemma3n_text"): (["model.layers"], 52, 3, None, "lm_head"),
    ("causal", "whisper"): (["model.decoder.layers"], 20, 0, None, "proj_out"),
    ("causal", "musicgen"): (["model.decoder.layers"], 20, 0, None, None),
    ("causal", "moshi"): (["model.layers"], 12, 2, None, "lm_head"),
    ("causal", "phi4_multimodal"): (["model.layers"], 8, 2, None, "lm_head"),
    ("image-text", "git"): (["git.encoder.layer"], 12, 0, None, "output"),
    ("image-text", "idefics"): (["model.layers", "model.gated_cross_attn_layers"], 28, 4, None, None),
    ("image-text", "blip"): (
        ["text_decoder.bert.encoder.layer"], 20, 0, None, "text_decoder.cls.predictions.decoder"
    ),
    ("image-text", "instructblip"): (["language_model.model.decoder.layers"], 12, 0, None, "language_model.lm_head"),
    ("image-text", "florence2"): (["model.language_model.decoder.layers"], 20, 0, None, "lm_head"),
    ("image-text", "pix2struct"): (["decoder.layer"], 22, 2, None, "decoder.lm_head"),
    ("image-text", "qwen3_5_moe"): (["model.language_model.layers"], 17, 2, "Qwen3_5MoeExperts", "lm_head"),
    ("image-text", "evolla"): (["model.layers"], 26, 2, None, "lm_head"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "model_type"), FOUND, ids=[name for _, name in FOUND])
def test_what_is_found(kind, model_type):
    layers, projections, gated, experts, head = FOUND[kind, model_type]
    anatomy = Anatomy(tiny_zoo.build(kind, model_type))
    assert list(dict.fromkeys(block.name.rpartition(".")[0] for block in anatomy.blocks)) == layers
    assert len(anatomy.projections) == projections
    assert len(anatomy.gated_mlps) == gated == sum(len(block.gated_mlps) for block in anatomy.blocks)
    assert {type(each.module).__name__ for each in anatomy.experts} == ({experts} if experts else set())
    assert (anatomy.head and anatomy.head.name) == head


@pytest.mark.parametrize("name", CONFIGS)
def test_known_families_have_roles(name):
    model = build(name)
    anatomy = Anatomy(model)
    assert len(anatomy.blocks) == 2
    assert {projection.name for projection in anatomy.projections} == {
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in path and "vision" not in path
    }
    assert anatomy.head.module is model.get_output_embeddings()
    roles = [projection.role for projection in anatomy.blocks[0].projections]
    assert None not in roles and len(set(roles)) == len(roles)
    assert not anatomy.refusals


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_have_experts_and_projections(name):
    anatomy = Anatomy(build(name))
    assert [experts.name for experts in anatomy.experts] == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    assert {projection.role for projection in anatomy.projections} == set("qkvo")
    assert [block.experts for block in anatomy.blocks] == [(experts,) for experts in anatomy.experts]


ENCODER_DECODERS = {
    "bart": lambda: tf.BartForConditionalGeneration(
        tf.BartConfig(
            vocab_size=300,
            d_model=32,
            encoder_layers=3,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
        )
    ),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_decoder_layers=2, num_heads=4)
    ),
    "t5-gated": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=300,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=3,
            num_decoder_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    ),
    "whisper": lambda: tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(
            vocab_size=300,
            d_model=32,
            encoder_layers=3,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_mel_bins=8,
            **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1),
        )
    ),
}


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_decoders_give_the_decoder_with_its_cross_attention(name):
    anatomy = Anatomy(ENCODER_DECODERS[name]().eval())
    assert len(anatomy.blocks) == 2
    assert all("decoder." in projection.name for projection in anatomy.projections)
    crossing = [p for p in anatomy.projections if "encoder_attn" in p.name or "EncDecAttention" in p.name]
    assert len(crossing) == 8
    assert len(anatomy.gated_mlps) == (2 if name == "t5-gated" else 0)


@pytest.mark.parametrize(("kind", "model_type"), [("causal", "gpt2"), ("causal", "falcon"), ("causal", "phi3")])
def test_a_projection_is_its_weight_and_bias(kind, model_type):
    anatomy = Anatomy(tiny_zoo.build(kind, model_type))
    for projection in (*anatomy.projections, anatomy.head):
        x = torch.randn(3, projection.weight.shape[1])
        torch.testing.assert_close(F.linear(x, projection.weight, projection.bias), projection.module(x))
        assert projection.weight.data_ptr() == projection.module.weight.data_ptr()


def test_the_weight_of_a_conv1d_is_by_columns():
    weight = Anatomy(tiny_zoo.build("causal", "gpt2")).projections[0].weight
    assert weight.shape == (192, 64) and weight.t().is_contiguous()


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("gpt_neox", "opt")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gated_mlps_compute_what_they_say(name, dtype):
    anatomy = Anatomy(build(name, dtype))
    assert [mlp.name.rpartition(".")[2] for mlp in anatomy.gated_mlps] == ["mlp", "mlp"] and not anatomy.refusals
    for mlp in anatomy.gated_mlps:
        x = torch.randn(1, 3, mlp.down.weight.shape[0], dtype=dtype)
        gate, up = (mlp.gate_up.module(x).chunk(2, -1)) if mlp.gate_up else (mlp.gate.module(x), mlp.up.module(x))
        expected = mlp.down.module(getattr(mlp.module, mlp.activation)(gate) * up)
        torch.testing.assert_close(mlp.module(x), expected)
    assert [block.gated_mlp for block in anatomy.blocks] == list(anatomy.gated_mlps)


def test_gated_mlps_of_zeros_and_of_huge_weights_are_taken():
    model = build("llama", torch.float16)
    zeros, huge = (layer.mlp for layer in model.model.layers)
    zeros.gate_proj.weight.zero_(), zeros.up_proj.weight.zero_()
    huge.down_proj.weight.fill_(1000)
    assert len(Anatomy(model).gated_mlps) == 2


@pytest.mark.parametrize(
    ("kind", "model_type", "words"),
    [
        ("causal", "bitnet", "not the stock one"),  # a norm before down
        ("causal", "deepseek_v4", "not the stock one"),  # gate and up are clipped
        ("image-text", "glm5_next", "not the stock one"),
        ("causal", "gemma3n_text", "not the stock one"),  # the first layer keeps 5 % of its gates
        ("causal", "lfm2", "activation is no module"),
    ],
)
def test_mlps_that_look_gated_are_refused(kind, model_type, words):
    anatomy = Anatomy(tiny_zoo.build(kind, model_type))
    _ = anatomy.blocks
    assert not anatomy.refusals
    found = len(anatomy.gated_mlps)
    assert found == {"gemma3n_text": 3}.get(model_type, 0)
    assert anatomy.refusals and all(words in refusal.reason for refusal in anatomy.refusals)
    assert anatomy.refusals[0].error().name == anatomy.refusals[0].name


def _five_times(mlp):
    stock = type(mlp)
    mlp.__class__ = type("FiveTimesMLP", (stock,), {"forward": lambda self, x: 5 * stock.forward(self, x)})


def _clipped(mlp):
    mlp.gate_proj.weight.mul_(0.1)
    stock = type(mlp)
    mlp.__class__ = type(
        "ClippedMLP",
        (stock,),
        {"forward": lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=20) * self.up_proj(x))},
    )


def _up_first(mlp):
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj
    stock = type(mlp)
    forward = lambda self, x: self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))  # noqa: E731
    mlp.__class__ = type("UpFirstMLP", (stock,), {"forward": forward})


def _three_arguments(mlp):
    stock = type(mlp)
    mlp.__class__ = type("RoutedMLP", (stock,), {"forward": lambda self, x, route: stock.forward(self, x)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_five_times, "FiveTimesMLP.*not the stock one"),
        (_clipped, "ClippedMLP.*not the stock one"),
        (_up_first, "UpFirstMLP.*not the stock one"),
        (_three_arguments, "RoutedMLP.*does not take hidden states alone.*route"),
        (lambda mlp: setattr(mlp, "forward", mlp.forward), "not the stock one"),
        (lambda mlp: setattr(mlp, "down_proj", QuantisedLinear(mlp.down_proj)), "down_proj.*quantised"),
    ],
    ids=["scaled", "clipped", "up-first", "arguments", "forward", "quantised"],
)
def test_gated_mlps_that_compute_something_else(model, change, words):
    change(model.model.layers[0].mlp)
    anatomy = Anatomy(model)
    assert [mlp.name for mlp in anatomy.gated_mlps] == ["model.layers.1.mlp"]
    with pytest.raises(hasten.UnsupportedModelError, match=rf"layers\.0\.mlp.*{words}"):
        raise anatomy.refusals[0].error()
    assert len(anatomy.refusals) == 1


def test_what_was_not_asked_for_is_not_refused(model):
    model.model.layers[0].mlp.up_proj = QuantisedLinear(model.model.layers[0].mlp.up_proj)
    anatomy = Anatomy(model)
    assert list(anatomy.modules(["LlamaMLP"])) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert anatomy.head and anatomy.model_type == "llama" and not anatomy.refusals
    assert len(anatomy.projections) == 13
    assert [refusal.name for refusal in anatomy.refusals] == ["model.layers.0.mlp.up_proj"]
    _ = anatomy.projections, anatomy.gated_mlps
    assert len(anatomy.refusals) == 1


def test_modules_are_those_of_transformers(model):
    model.model.layers[0].mlp.__class__ = type("LlamaMLP", (nn.Module,), {"__module__": "mine"})
    assert list(Anatomy(model).modules({"LlamaMLP", "Missing"})) == ["model.layers.1.mlp"]


def test_without(model):
    anatomy = Anatomy(model)
    rest = anatomy.without(["model.layers.0.mlp.up_proj", "lm_head", "model.layers.1.mlp"])
    assert rest.head is None and rest.gated_mlps == ()
    assert len(rest.projections) == 13 and [len(block.projections) for block in rest.blocks] == [6, 7]
    assert len(anatomy.projections) == 14 and anatomy.head and len(anatomy.gated_mlps) == 2
    assert rest.without(["model.layers.0.mlp.down_proj"]).blocks[0].projections == rest.blocks[0].projections[:-1]
    mixture = Anatomy(build("mixtral"))
    assert len(mixture.without(["model.layers.0.mlp.experts"]).experts) == 1


def test_refusals_of_what_was_taken_out_are_gone(model):
    model.model.layers[0].mlp.up_proj = QuantisedLinear(model.model.layers[0].mlp.up_proj)
    anatomy = Anatomy(model).without(["model.layers.0.mlp.up_proj"])
    assert len(anatomy.projections) == 13 and not anatomy.refusals


class QuantisedLinear(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.register_buffer("qweight", linear.weight.to(torch.int8))


class Adapted(nn.Module):
    """As adapters wrap a projection."""

    def __init__(self, linear):
        super().__init__()
        self.base_layer, self.lora_A = linear, nn.Linear(linear.in_features, 2, bias=False)


class Subclass(nn.Linear):
    pass


def _with_weight(change):
    def changed(linear):
        linear.weight = nn.Parameter(change(linear.weight.detach()), requires_grad=False)
        return linear

    return changed


def _with_forward(linear):
    linear.forward = linear.forward
    return linear


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (QuantisedLinear, "QuantisedLinear.*quantised.*without quantisation"),
        (Adapted, "Adapted.*not a plain torch.nn.Linear.*merge"),
        (lambda linear: Subclass(64, 176), "Subclass.*not a plain torch.nn.Linear.*merge"),
        (lambda linear: linear.to("meta"), "meta device.*whole model.*one device"),
        (_with_weight(lambda w: w.t().contiguous().t()), r"strides \(1, 176\).*contiguous"),
        (_with_weight(lambda w: w.to(torch.int8)), "torch.int8.*float32, float16 or bfloat16"),
        (_with_weight(lambda w: w.double()), "torch.float64.*float32, float16 or bfloat16"),
        (_with_forward, "forward was replaced.*forward of its class"),
        (lambda linear: prune.random_unstructured(linear, "weight", 0.5), r"computed.*prune\.remove"),
        (parametrizations.weight_norm, r"computed.*permanent"),
        (lambda linear: torch.compile(linear, backend="eager"), r"compiled.*compile after"),
    ],
    ids=[
        "quantised",
        "lora",
        "subclass",
        "meta",
        "strides",
        "int8",
        "float64",
        "forward",
        "pruned",
        "parametrised",
        "compiled",
    ],
)
def test_linears_that_are_refused(model, change, words):
    mlp = model.model.layers[1].mlp
    mlp.up_proj = change(mlp.up_proj)
    anatomy = Anatomy(model)
    assert "model.layers.1.mlp.up_proj" not in [projection.name for projection in anatomy.projections]
    assert len(anatomy.projections) == 13
    assert [refusal.name for refusal in anatomy.refusals] == ["model.layers.1.mlp.up_proj"]
    with pytest.raises(hasten.UnsupportedModelError, match=rf"layers\.1\.mlp\.up_proj .*{words}"):
        raise anatomy.refusals[0].error()


def test_the_head_is_refused_for_the_same_reasons(model):
    model.lm_head.weight.data = model.lm_head.weight.double()
    anatomy = Anatomy(model)
    assert anatomy.head is None
    assert [refusal.name for refusal in anatomy.refusals] == ["lm_head"]
    assert len(anatomy.projections) == 14


@pytest.mark.parametrize("where", ["cpu", "disk", "both"])
def test_offloaded_weights_are_refused(model, where, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    if where == "cpu":
        model = accelerate.cpu_offload(model, execution_device="cpu")
    elif where == "disk":
        model = accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    else:
        device_map = {name: "cpu" for name, _ in model.model.named_children()}
        device_map = {f"model.{name}": device for name, device in device_map.items() if name != "layers"}
        device_map |= {"lm_head": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
        model = accelerate.dispatch_model(model, device_map, offload_dir=tmp_path, force_hooks=True)
    anatomy = Anatomy(model)
    assert anatomy.projections == () and anatomy.head is None and len(anatomy.refusals) == 15
    assert {refusal.remedy for refusal in anatomy.refusals} == {"load the whole model into the memory of one device"}


def test_several_devices():
    far = nn.Linear(3, 3, device="meta")
    refusal = elsewhere("b.up", far, torch.device("cpu"), "a.up")
    with pytest.raises(hasten.UnsupportedModelError, match=r"b\.up.*it is on meta, a\.up is on cpu.*one device"):
        raise refusal.error()


@pytest.mark.parametrize("share", ["module", "weight"])
def test_shared_weights_are_refused_by_name(model, share):
    first, second = model.model.layers
    if share == "module":
        second.mlp = first.mlp
    else:
        second.mlp.up_proj.weight = first.mlp.up_proj.weight
    anatomy = Anatomy(model)
    assert len(anatomy.with_shared) == (11 if share == "module" else 14) and not anatomy.refusals
    names = [projection.name for projection in anatomy.projections]
    assert len(names) == (8 if share == "module" else 12)
    assert not any(name.endswith("mlp.up_proj") for name in names)
    with pytest.raises(hasten.UnsupportedModelError, match=r"layers\.1\.mlp.*shares its weight with .*layers\.0\.mlp"):
        raise anatomy.refusals[0].error()
    assert len(anatomy.refusals) == 14 - len(names)


def test_a_weight_shared_with_something_else_is_refused(model):
    model.model.extra = nn.Embedding(176, 64)
    model.model.extra.weight = model.model.layers[0].mlp.up_proj.weight
    anatomy = Anatomy(model)
    assert len(anatomy.projections) == 13
    assert anatomy.refusals[0].reason == "it shares its weight with model.extra"


def test_a_head_tied_to_the_embedding_is_taken():
    anatomy = Anatomy(build("llama-tied"))
    assert anatomy.head.module.weight is anatomy.model.model.embed_tokens.weight
    assert len(anatomy.projections) == 14 and not anatomy.refusals


def test_experts_without_a_known_layout_are_refused():
    anatomy = Anatomy(tiny_zoo.build("causal", "jetmoe"))
    assert len(anatomy.projections) == 6 and not anatomy.refusals
    assert anatomy.experts == ()
    assert {refusal.kind.rpartition(".")[2] for refusal in anatomy.refusals} == {"JetMoeParallelExperts"}


def test_models_without_a_decoder_are_refused(model):
    with pytest.raises(hasten.UnsupportedModelError, match=r"Sequential.*no list of decoder layers.*ForCausalLM"):
        _ = Anatomy(nn.Sequential(nn.Linear(3, 3))).blocks
    with pytest.raises(hasten.UnsupportedModelError, match=r"LlamaModel.*no language-model head.*ForCausalLM"):
        _ = Anatomy(model.model).head
    assert len(Anatomy(model.model).projections) == 14


def test_a_projection_can_be_anything_made_of_linears(model):
    model.model.layers[0].mlp.up_proj = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 176)).requires_grad_(False)
    names = [projection.name for projection in Anatomy(model).projections]
    assert names[5:7] == ["model.layers.0.mlp.up_proj.0", "model.layers.0.mlp.up_proj.1"]
    assert isinstance(Anatomy(model).projections[5], Projection) and Anatomy(model).projections[5].role is None


def test_errors_of_refusals_are_hastens(model):
    model.model.layers[0].mlp.up_proj = QuantisedLinear(model.model.layers[0].mlp.up_proj)
    anatomy = Anatomy(model)
    _ = anatomy.projections
    error = anatomy.refusals[0].error()
    assert isinstance(error, HastenError)
    assert str(error).startswith("model.layers.0.mlp.up_proj (") and str(error).endswith("without quantisation")
