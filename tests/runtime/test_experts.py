"""The fused experts of every class in the installed transformers: a decode step over the picked ones is their
forward."""

import re

import pytest
import tiny_models
import torch
import transformers
from experts_classes import CONFIG, EXPERTS, HIDDEN, INTERMEDIATE, build, names
from torch import nn

import hasten
from hasten.acceleration import experts, measure
from hasten.acceleration.anatomy import Anatomy
from hasten.acceleration.techniques import dense_decode
from hasten.acceleration.techniques.input_sparsity import SparseExperts
from hasten.kernels import backend, storage
from hasten.sparsity.wina import wina

# Fused, but of another form; why_not says so.
REFUSED = {"InklingSharedExperts", "JetMoeParallelExperts"}
# Modules of nn.Linears, which are projections like any other.
SEPARATE = {"AriaSharedExpertsMLP", "NllbMoeExperts", "SwitchTransformersExperts"}
PICKS = 2


def call(module, layout, T):
    """Arguments of the module's forward for T tokens, each of which picks PICKS experts."""
    x = torch.randn(T, layout.hidden)
    count = layout.experts + (CONFIG["zero_expert_num"] if layout.identity else 0)
    index = torch.stack([torch.randperm(count)[:PICKS] for _ in range(T)])
    weights = torch.rand(T, PICKS)
    if layout.dispatch == "picked":
        return x, index, weights
    scores = torch.zeros(T, count).scatter_(1, index, weights)
    return ((scores.t().unsqueeze(-1) * x).reshape(-1, layout.hidden),)


def assert_close(result, expected):
    assert result.dtype == expected.dtype
    error = (result - expected.view(result.shape)).norm() / expected.norm()
    assert error <= 1e-5, f"relative error {error:.1e}"


@pytest.mark.parametrize("name", sorted(names().keys() - REFUSED - SEPARATE))
def test_decode_is_the_forward_of_the_module(name):
    module = build(name)
    assert experts.why_not(module) is None
    layout = experts.layout_of(module)
    assert (layout.experts, layout.hidden, layout.intermediate) == (EXPERTS, HIDDEN, INTERMEDIATE)
    for T in (1, 3, 8):
        arguments = call(module, layout, T)
        assert layout.tokens(arguments[0]) == T
        result = experts.decode_experts(module, layout, *arguments)
        assert result.shape == arguments[0].shape
        assert_close(result, module(*arguments))


def test_most_classes_are_taken():
    assert len(names().keys() - REFUSED - SEPARATE) >= 60


@pytest.mark.parametrize("name", sorted(REFUSED & names().keys()))
def test_fused_experts_of_another_form_are_refused_with_the_reason(name):
    module = build(name)
    assert experts.layout_of(module) is None
    assert experts.why_not(module).startswith("its weights are ")


def test_experts_are_known_whatever_their_class_is_called():
    module = build("MixtralExperts")
    layout = experts.layout_of(module)
    module.__class__ = type("MoeBank", (type(module),), {})
    assert experts.layout_of(module) == layout
    for name, weight in (("w1", module.gate_up_proj), ("w2", module.down_proj)):
        module.register_parameter(name, weight)
    del module.gate_up_proj, module.down_proj
    assert experts.why_not(module) == "its weights are w1, w2; expected gate_up_proj or up_proj, and down_proj"


def test_other_parameters_of_three_dimensions_are_no_experts():
    heads, filters, tables = nn.Module(), nn.Conv1d(24, 24, 4, groups=24), nn.Module()
    heads.a, heads.b = (nn.Parameter(torch.zeros(4, 16, 16)) for _ in range(2))
    tables.a, tables.b = nn.Parameter(torch.zeros(1, 16, 24)), nn.Parameter(torch.zeros(1, 8, 24))
    recurrence = transformers.models.zamba.modeling_zamba.ZambaMambaMixer(transformers.ZambaConfig(hidden_size=64), 0)
    for module in (heads, filters, tables, recurrence):
        assert experts.layout_of(module) is None and experts.why_not(module) is None


def test_a_mixture_of_another_name_is_accelerated(no_contest):
    model = tiny_models.build("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts.__class__ = type("MoeBank", (type(layer.mlp.experts),), {})
    ids = tiny_models.token_ids(1, 64)
    report = hasten.accelerate(model, hasten.Wina(0.5), calibration=ids, measure_speed=False, measure_drift=False)
    assert "model.layers.1.mlp.experts" in report.techniques[0].edited


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}
PICKING = {
    "qwen3_moe": transformers.Qwen3MoeConfig(**SMALL, num_experts=6, num_experts_per_tok=5, moe_intermediate_size=16),
    "dbrx": transformers.DbrxConfig(
        d_model=32,
        n_heads=2,
        n_layers=1,
        vocab_size=40,
        attn_config={"kv_n_heads": 1, "rope_theta": 10000.0},
        ffn_config={"moe_top_k": 5, "moe_num_experts": 6, "ffn_hidden_size": 16},
    ),
    "hunyuan_v1_moe": transformers.HunYuanMoEV1Config(
        **SMALL, num_key_value_heads=2, head_dim=16, intermediate_size=16, num_experts=6, moe_topk=[5]
    ),
}


@pytest.mark.parametrize("name", PICKING)
def test_the_contest_picks_as_many_experts_as_the_model(name, monkeypatch):
    """And what it finds is kept for that number, on that GPU."""
    model = transformers.AutoModelForCausalLM.from_config(PICKING[name]).eval()
    picked, keys = set(), []

    def contend(contest, device):
        theirs, _ = contest(2, 0)
        if len(theirs.args) > 1:
            picked.add(theirs.args[1].shape)
        return 8, 1.5

    monkeypatch.setattr(measure, "faster_up_to", contend)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(dense_decode, "device_of", lambda module: torch.device("cuda", 3))
    monkeypatch.setattr(dense_decode, "remembered", lambda key, work: (keys.append(key), work())[1])
    hasten.DenseDecode().settle(Anatomy(model), hasten.Statistics())
    assert picked == {(2, 5)}
    assert all("on GPU 3:" in key for key in keys)
    assert [key.endswith(", 5 picked") for key in keys if "Experts" in key] == [True]


@pytest.mark.parametrize("name", sorted(SEPARATE & names().keys()))
def test_experts_of_linear_layers_are_none(name):
    module = build(name)
    assert any(isinstance(child, nn.Linear) for child in module.modules())
    assert experts.layout_of(module) is None and experts.why_not(module) is None


NAMES = [
    "MixtralExperts",
    "GptOssExperts",
    "NemotronHExperts",
    "DbrxExperts",
    "Llama4TextExperts",
    "LongcatFlashExperts",
]


def columns(weight, parameter):
    """The same values, with the columns of each expert contiguous."""
    return parameter.data.contiguous() if weight.transposed else storage.to_column_major(parameter.data)


@pytest.mark.parametrize("name", NAMES)
def test_column_major_experts_change_nothing_for_the_module(name):
    module = build(name)
    layout = experts.layout_of(module)
    arguments = call(module, layout, 3)
    expected = module(*arguments)
    for weight in layout.weights:
        if weight.flat and not weight.transposed:  # rows of several experts cannot be stored by columns
            continue
        parameter = weight.parameter(module)
        parameter.data = columns(weight, parameter)
        assert weight.of(module, layout.experts).mT.is_contiguous()
    assert experts.layout_of(module) == layout
    torch.testing.assert_close(module(*arguments), expected)
    assert_close(experts.decode_experts(module, layout, *arguments), expected)


@pytest.mark.parametrize("name", NAMES)
def test_cutoffs_skip_the_small_inputs_of_each_expert(name):
    """One token: the same as a forward of the module whose weights are zero where an input of that expert is small."""
    module = build(name)
    layout = experts.layout_of(module)
    arguments = call(module, layout, 1)
    cutoffs = {}
    for weight in layout.weights:  # in order, as what a map reads depends on what the maps before it skip
        if weight.flat and not weight.transposed:
            continue
        weight.parameter(module).data = columns(weight, weight.parameter(module))
        cutoffs[weight.name] = torch.rand(layout.experts, weight.of(module, layout.experts).shape[-1])
    result = experts.decode_experts(module, layout, *arguments, cutoffs=cutoffs)
    dense = experts.decode_experts(module, layout, *arguments)
    for weight in layout.weights:
        if weight.name not in cutoffs:
            continue
        for e, inputs in experts.expert_inputs(module, layout, *arguments[:2]):
            inactive = inputs[weight.name][0].abs() <= cutoffs[weight.name][e]
            assert inactive.any()
            weight.of(module, layout.experts)[e][:, inactive] = 0
    assert_close(result, module(*arguments))
    assert not torch.allclose(result, dense)


@pytest.mark.parametrize("name", ["MixtralExperts", "AriaExperts"])
def test_experts_of_another_device_add_nothing(name):
    """Expert parallelism marks them by the id E, with a weight of zero."""
    module = build(name)
    layout = experts.layout_of(module)
    x, index, weights = call(module, layout, 3)
    index[0, 1], weights[0, 1] = EXPERTS, 0
    index[2], weights[2] = EXPERTS, 0
    result = experts.decode_experts(module, layout, x, index, weights)
    assert_close(result, module(x, index, weights))
    assert not result[2].any()


@pytest.mark.parametrize("skipping", [False, True], ids=["dense", "skipping"])
def test_inputs_of_experts_are_what_their_maps_read(skipping):
    """Of a cutoff, those that some token needs."""
    module = build("GptOssExperts")
    layout = experts.layout_of(module)
    x, index, weights = call(module, layout, 8)
    cutoffs = {w.name: torch.rand(EXPERTS, w.of(module, EXPERTS).shape[-1]) for w in layout.weights}
    out = torch.zeros_like(x)
    for e, inputs in experts.expert_inputs(module, layout, x, index, cutoffs if skipping else None):
        tokens, places = torch.where(index == e)
        needed = (x[tokens].abs() > cutoffs["gate_up_proj"][e]).any(0)
        assert torch.equal(inputs["gate_up_proj"], x[tokens] * needed if skipping else x[tokens])
        y = inputs["down_proj"] @ module.down_proj[e] + module.down_proj_bias[e]
        out.index_add_(0, tokens, y * weights[tokens, places, None])
    expected = experts.decode_experts(module, layout, x, index, weights, cutoffs if skipping else None)
    assert_close(out, expected)
    assert torch.allclose(expected, module(x, index, weights), rtol=1e-4, atol=1e-5) != skipping


def test_active_inputs_are_counted_as_decode_skips_them():
    """In float64: what down reads comes of the inputs that gate and up do not skip."""
    module = build("MixtralExperts")
    for parameter in module.parameters():
        parameter.data = parameter.mT.contiguous().mT
    forward = SparseExperts(module, "experts", wina, [0.5, 0.05])
    x, index, weights = call(module, forward.layout, 1)
    active = {"inputs": 0, "skipped": 0, "dense": 0}
    for e in index[0]:
        up, down = module.gate_up_proj[e].double(), module.down_proj[e].double()
        kept = x[0].double() * (x[0].abs().double() * up.norm(dim=0) > 0.5)
        for way, rows in {"skipped": kept, "dense": x[0].double()}.items():
            gate, neurons = (up @ rows).chunk(2)
            neurons = nn.functional.silu(gate) * neurons
            active[way] += int((kept != 0).sum() + (neurons.abs() * down.norm(dim=0) > 0.05).sum())
        active["inputs"] += HIDDEN + INTERMEDIATE
    assert active["skipped"] != active["dense"]
    assert forward.active(x, index, weights) == (active["skipped"], active["inputs"])
    assert forward.active(*call(module, forward.layout, 2)) is None, "several tokens are exact"


def test_more_dimensions_and_other_dtypes():
    module = build("MixtralExperts").bfloat16()
    layout = experts.layout_of(module)
    x, index, weights = call(module, layout, 6)
    expected = experts.decode_experts(module, layout, x.bfloat16(), index, weights)
    assert expected.dtype == torch.bfloat16
    single = experts.decode_experts(module, layout, x.view(2, 3, HIDDEN), index, weights)
    assert single.shape == (2, 3, HIDDEN) and single.dtype == torch.float32
    torch.testing.assert_close(single.view(6, HIDDEN).bfloat16(), expected, atol=0, rtol=1e-2)


def test_the_definition_has_gradients():
    module = build("MixtralExperts")
    layout = experts.layout_of(module)
    x, index, weights = call(module, layout, 2)
    x.requires_grad_()
    with backend.use("reference"):
        found = torch.autograd.grad(experts.decode_experts(module, layout, x, index, weights).sum(), x)
    expected = torch.autograd.grad(module(x, index, weights).sum(), x)
    torch.testing.assert_close(found, expected)


def quantised(module):
    module.down_proj = nn.Parameter(module.down_proj.to(torch.int8), requires_grad=False)


def sliced(module):
    module.down_proj.data = torch.zeros(EXPERTS, HIDDEN, 2 * INTERMEDIATE)[..., ::2]


def hooked(module):
    module.forward = module.forward


def with_another_bias(module):
    module.gate_up_proj_bias = nn.Parameter(torch.zeros(EXPERTS, 2 * INTERMEDIATE))


def with_another_size(module):
    module.down_proj = nn.Parameter(torch.zeros(EXPERTS, HIDDEN, INTERMEDIATE + 1))


def with_another_weight(module):
    module.mid_proj = nn.Parameter(torch.zeros(EXPERTS, HIDDEN, HIDDEN))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (quantised, "down_proj is a Tensor of torch.int8: quantised"),
        (lambda module: module.to("meta"), "gate_up_proj is offloaded or on the meta device"),
        (sliced, "down_proj is stored with strides"),
        (hooked, "its forward was replaced on the instance"),
        (with_another_bias, "has_bias is False, and its parameters of two dimensions are gate_up_proj_bias"),
        (with_another_size, r"gate_up_proj \[5, 32, 24\] and down_proj \[5, 24, 17\]"),
        (with_another_weight, "its weights are .*mid_proj; expected gate_up_proj or up_proj, and down_proj"),
    ],
)
def test_what_cannot_be_run_is_refused_with_the_reason(change, reason):
    module = build("MixtralExperts")
    change(module)
    assert experts.layout_of(module) is None
    assert re.search(reason, experts.why_not(module))


class SomebodysExperts(nn.Module):
    """Shaped like transformers' experts, and silent about its gate."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(EXPERTS, 2 * INTERMEDIATE, HIDDEN))
        self.down_proj = nn.Parameter(torch.zeros(EXPERTS, HIDDEN, INTERMEDIATE))


def test_an_unknown_gate_is_refused_and_other_modules_are_not_experts():
    assert experts.layout_of(SomebodysExperts()) is None
    assert "no _apply_gate" in experts.why_not(SomebodysExperts())
    for module in (nn.Linear(2, 3), nn.Conv1d(2, 3, 4), build("MixtralExperts").act_fn):
        assert experts.layout_of(module) is None and experts.why_not(module) is None
