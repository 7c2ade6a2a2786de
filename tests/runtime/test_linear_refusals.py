"""FastLinearAttention refuses, by name, what it would not compute as transformers does."""

import dis
import inspect
import sys

import linear_models
import pytest
import torch
import transformers as tf
from linear_models import generated, ids, rows

import hasten
from hasten.acceleration.caches import caches
from hasten.acceleration.techniques import fast_linear_attention, linear_attention_layers
from hasten.acceleration.techniques.adapted_forwards import IGNORED
from hasten.acceleration.techniques.linear_attention_layers import LAYERS

FAMILIES = list(linear_models.CONFIGS)
PLAN = hasten.FastLinearAttention()
PACKED = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


def layers_of(model):
    return {name: layer for name, layer in model.named_modules() if type(layer).__name__ in LAYERS}


def read_names(function):
    """The variables that a function's body reads."""
    steps = [step for step in dis.get_instructions(function) if step.opname.startswith("LOAD_")]
    names = [step.argval if isinstance(step.argval, tuple) else (step.argval,) for step in steps]
    return {name for group in names for name in group}


def test_a_minimax_cache_that_counts_no_tokens_is_refused():
    model, tokens = linear_models.build("minimax"), ids(2, 60)
    cache = model(input_ids=tokens[:, :50], use_cache=True).past_key_values
    hasten.accelerate(model, PLAN, measure_speed=False)
    for begin in (50, 59):
        with pytest.raises(ValueError, match="transformers' own layers filled: it counts 0 tokens"):
            model(input_ids=tokens[:, begin:], past_key_values=cache, use_cache=True)


def test_a_model_without_such_layers():
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**linear_models.BASE, intermediate_size=48, num_hidden_layers=1))
    with pytest.raises(
        hasten.UnsupportedModelError, match=r"no linear-attention layer .*'llama'.* known are those of MiniMax"
    ):
        hasten.accelerate(model.eval().requires_grad_(False), PLAN)


def test_a_forward_of_someone_else():
    model = linear_models.build("mamba2")
    layer = model.backbone.layers[1].mixer
    layer.forward = layer.forward
    with pytest.raises(
        hasten.UnsupportedModelError, match=r"backbone.layers.1.mixer.* forward was replaced on the instance"
    ):
        hasten.accelerate(model, PLAN, measure_speed=False)
    report = hasten.accelerate(model, PLAN, strict=False, measure_speed=False)
    assert [skip.name for skip in report.skipped] == ["backbone.layers.1.mixer"]
    model.backbone.layers[0].mixer.forward = print
    with pytest.raises(hasten.StateError, match=r"the forward of backbone.layers.0.mixer was replaced after"):
        hasten.revert(model)


def test_a_layer_on_the_meta_device():
    model = linear_models.build("mamba2")
    model.backbone.layers[0].mixer.to("meta")
    with pytest.raises(hasten.UnsupportedModelError, match=r"layers.0.mixer.* meta device"):
        hasten.accelerate(model, PLAN, measure_speed=False)


def test_a_quantised_layer():
    model = linear_models.build("mamba2")
    layer = model.backbone.layers[0].mixer
    layer.in_proj.weight = torch.nn.Parameter(layer.in_proj.weight.to(torch.int8), requires_grad=False)
    refusal = fast_linear_attention._refusal("mixer", layer)
    assert refusal.reason == "its in_proj.weight is quantised (torch.int8)" and "quantisation" in refusal.remedy


def test_a_layer_of_another_transformers(monkeypatch):
    """Whose forward does not call what would be replaced: it would be left as slow as it is, and say nothing."""
    model = linear_models.build("mamba2")
    other = linear_attention_layers.Layer("Mamba-2", None, ("causal_conv1d_fn", "a_scan_of_the_future"))
    monkeypatch.setitem(linear_attention_layers.LAYERS, "Mamba2Mixer", other)
    fast_linear_attention._missing.cache_clear()
    with pytest.raises(hasten.UnsupportedModelError, match="its forward does not call a_scan_of_the_future"):
        hasten.accelerate(model, PLAN, measure_speed=False)
    fast_linear_attention._missing.cache_clear()


def test_packed_sequences_are_refused():
    model = linear_models.build("qwen3_next")
    hasten.accelerate(model, PLAN, measure_speed=False)
    with pytest.raises(ValueError, match="packed sequences"):
        model(input_ids=ids(1, 20), cu_seq_lens_q=torch.tensor([0, 10, 20]))


@pytest.mark.parametrize("family", FAMILIES)
def test_arguments_that_a_model_is_called_with(family):
    """Flags of outputs change nothing; what transformers' kernels would be told besides is refused."""
    model, tokens = linear_models.build(family), ids(1, 20)
    hasten.accelerate(model, PLAN, measure_speed=False)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        output = model(input_ids=tokens, output_hidden_states=True, use_cache=False)
    assert torch.equal(output.logits, expected) and len(output.hidden_states) >= 2
    with pytest.raises(ValueError, match=r"packed sequences \(seq_idx\)"):
        model(input_ids=tokens, seq_idx=torch.zeros(1, 20, dtype=torch.int32))


@pytest.mark.parametrize("family", ["minimax", "qwen3_next", "mamba2"])
def test_what_a_recurrent_state_cannot_do(family):
    """Crop, and assisted decoding, which needs it: refused before a wrong token comes out."""
    model = linear_models.build(family)
    hasten.accelerate(model, PLAN, measure_speed=False)
    with pytest.raises(ValueError, match="not supported with stateful models"):
        generated(model, ids(1, 30), assistant_model=linear_models.build(family))
    with pytest.raises(ValueError, match="not supported with stateful models"):
        generated(model, ids(1, 30), prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_argument_of_a_replaced_function_is_read_ignored_by_name_or_refused(family):
    """Whatever transformers' functions take: nothing is dropped in silence."""
    replaced = 0
    for layer in {type(layer): layer for layer in layers_of(linear_models.build(family)).values()}.values():
        entry, module = LAYERS[type(layer).__name__], sys.modules[type(layer).__module__]
        functions = {name: (getattr(module, name), adapter) for name, adapter in entry.replaced.items()}
        if not functions:
            functions = {"forward": (type(layer).forward, entry.make(layer))}
        for name, (stock, adapter) in functions.items():
            theirs = inspect.signature(stock).parameters.values()
            theirs = [parameter for parameter in theirs if parameter.kind is not parameter.VAR_KEYWORD]
            ours = list(inspect.signature(adapter).parameters)
            own = [parameter.name for parameter in theirs if parameter.name in ours]
            assert own == ours[: len(own)], f"{name} takes them in the same order"
            needed = {p.name: None for p in theirs if p.default is p.empty}
            for parameter in theirs:
                if parameter.name in ours:
                    assert parameter.name in read_names(adapter) or parameter.name in IGNORED, (name, parameter.name)
                elif parameter.name not in IGNORED:
                    with pytest.raises(ValueError, match=parameter.name):
                        adapter(**needed | {parameter.name: 1})
                replaced += 1
    assert replaced


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_and_adapters_refuse_what_they_do_not_compute(family):
    """Whatever is passed besides, but for None and for what no layer's output depends on."""
    model = linear_models.build(family)
    hasten.accelerate(model, PLAN, measure_speed=False)
    functions = [layer.forward for layer in layers_of(model).values()][:1]
    for adapter in LAYERS[type(functions[0].module).__name__].replaced.values():
        parameters = inspect.signature(adapter).parameters.values()
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            functions.append(adapter)
    for function in functions:
        parameters = inspect.signature(function).parameters.values()
        kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        needed = {p.name: None for p in parameters if p.default is p.empty and p.kind not in kinds}
        for name, value in {"head_first": True, "A_log": torch.zeros(3), "is_causal": False, "z_gate": 0}.items():
            with pytest.raises(ValueError, match=rf"does not compute {name}, got "):
                function(**needed, **{name: value})
        for name in PACKED:
            with pytest.raises(ValueError, match=rf"packed sequences \({name}\)"):
                function(**needed, **{name: torch.tensor([0, 2])})


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_states_of_another_shape(family, tokens):
    """A cache that another model filled: one whose heads or channels have another size."""
    model = linear_models.build(family)
    hasten.accelerate(model, PLAN, measure_speed=False)
    for kind in linear_models.STATES.get(family, ("recurrent", "convolution")):
        B = rows(family, 3)
        output = model(input_ids=ids(B, 20), use_cache=True)
        cache = caches(output)
        linear_models.shorten(next(iter(cache.values())), kind)
        with pytest.raises(ValueError, match=r"in the cache: expected shape \[.*\], got shape \["):
            model(input_ids=ids(B, tokens), use_cache=True, **cache)


def test_rows_that_transformers_mixes_are_refused():
    model = linear_models.build("rwkv")
    hasten.accelerate(model, PLAN, measure_speed=False)
    state = model(input_ids=ids(3, 20), use_cache=True).state
    with pytest.raises(ValueError, match=r"mixes the rows of a batch .* got a batch of 3"):
        model(input_ids=ids(3, 1), state=state, use_cache=True)
    assert generated(model, ids(3, 20), use_cache=False).shape == (3, 28)
