"""FastLinearAttention on tiny models of every family: the same predictions in every way of running them, and a model
left as it was."""

import copy
import inspect
import pickle
import sys

import linear_models
import pytest
import torch
import transformers as tf
from linear_models import expected_logits, generated, ids, rows
from running import distance, logits, read, relative_error

import hasten
from hasten.acceleration.caches import caches
from hasten.acceleration.techniques import (
    convolution_adapters,
    delta_rule_adapters,
    mamba2_adapters,
    minimax_adapters,
    rwkv_adapters,
    selective_scan_adapters,
    xlstm_adapters,
)

FAMILIES = list(linear_models.CONFIGS)
ONE_OF_EACH = ["minimax", "qwen3_next", "kimi_linear", "mamba2", "falcon_h1"]
GENERATING = [*ONE_OF_EACH, "qwen4_exp", "glm5_next", "lfm2", "lfm2_moe", "lfm3"]
GENERATING += ["mamba", "falcon_mamba", "jamba", "zamba", "xlstm", "rwkv"]
PADDED = [family for family in FAMILIES if family not in linear_models.WITHOUT_A_MASK]
IN_CHUNKS = [family for family in PADDED if family not in ("mamba", "falcon_mamba", "mamba2", "minimax")]
PLAN = hasten.FastLinearAttention()
ADAPTERS = (
    convolution_adapters,
    delta_rule_adapters,
    mamba2_adapters,
    minimax_adapters,
    rwkv_adapters,
    selective_scan_adapters,
    xlstm_adapters,
)
RECURRENCES = {"linear_attention", "linear_attention_step", "delta_rule", "delta_rule_step", "wkv"}
RECURRENCES |= {"selective_scan", "selective_scan_step"}
CONVOLUTIONS = {"causal_conv1d", "causal_conv1d_update"}


@pytest.fixture
def calls(monkeypatch):
    """How often each kernel was called; `counts_of` picks those of the recurrence."""
    counts = {}
    for module in ADAPTERS:
        for name in (RECURRENCES | CONVOLUTIONS) & vars(module).keys():
            kernel = getattr(module, name)

            def counted(*arguments, name=name, kernel=kernel, **settings):
                counts[name] = counts.get(name, 0) + 1
                return kernel(*arguments, **settings)

            monkeypatch.setattr(module, name, counted)
    return counts


def counts_of(calls):
    """How often the kernels of a layer's recurrence were called, or of its convolution where it has no recurrence."""
    return sum(count for name, count in calls.items() if name in (RECURRENCES & calls.keys() or CONVOLUTIONS))


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_continuation_and_decode(family, calls):
    model, tokens, parts = linear_models.build(family), ids(rows(family, 3)), [70, 22] + 20 * [1]
    before, stock = expected_logits(model, family, tokens, parts), read(model, tokens[:, :16], [16])
    report = hasten.accelerate(model, PLAN, measure_speed=False)
    layers = len(report.techniques[0].edited)
    assert layers >= 2 and report.self_check < 1e-5
    heads = 2 if family == "zamba" else 1  # which scans its heads one by one
    calls.clear()
    after = read(model, tokens, parts)
    assert relative_error(after, before) < 5e-6 and distance(after, before) < 2e-5
    assert counts_of(calls) == 22 * layers * heads, "every layer in the prefill, the continuation and each step"
    hasten.revert(model)
    assert torch.equal(read(model, tokens[:, :16], [16]), stock)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", PADDED)
def test_left_padding(family):
    """Rows of several lengths, read in parts."""
    model, tokens, parts = linear_models.build(family), ids(3, 45), [30, 10] + 5 * [1]
    mask = torch.ones_like(tokens)
    mask[0, :13] = mask[1, :5] = 0
    before = expected_logits(model, family, tokens, parts, mask)
    with hasten.accelerated(model, PLAN, measure_speed=False):
        after = read(model, tokens, parts, mask)
    assert relative_error(after[mask.bool()], before[mask.bool()]) < 5e-6


@pytest.mark.parametrize("family", ["qwen3_5", "olmo_hybrid", "mamba2", "bamba", "falcon_h1", "zamba2"])
def test_as_near_to_float64_as_transformers(family):
    """Where transformers runs in float64 at all (its recurrences then run in float32, or its experts do not run)."""
    exact = logits(linear_models.build(family).double(), ids(), [70, 37, 1, 1, 1, 1, 1])
    model = linear_models.build(family)
    theirs = distance(logits(model, ids(), [70, 37, 1, 1, 1, 1, 1]), exact)
    hasten.accelerate(model, PLAN, measure_speed=False)
    assert distance(logits(model, ids(), [70, 37, 1, 1, 1, 1, 1]), exact) < 1.5 * theirs + 2e-6


@pytest.mark.parametrize("family", GENERATING)
def test_generate(family):
    model, tokens = linear_models.build(family), ids(rows(family, 2), 40)
    ways = {"greedy": {}, "sampling": {"do_sample": True, "temperature": 1.5}, "beam": {"num_beams": 3}}
    if family in linear_models.NO_BEAMS:
        del ways["beam"]
    if family in PADDED:
        tokens[0, :9] = 0
        mask = tokens.ne(0).long()
        ways |= {"left-padded": {"attention_mask": mask}, "padded beam": {"attention_mask": mask, "num_beams": 2}}
    # What transformers' own cache gets wrong, it computes without one.
    cached = {"use_cache": False} if family in linear_models.WRONG_IN_PARTS else {}
    expected = {way: generated(model, tokens, **settings, **cached) for way, settings in ways.items()}
    if family in IN_CHUNKS:  # for the others transformers 5.23 makes no cache before it
        ways["in chunks"], expected["in chunks"] = {"prefill_chunk_size": 16}, expected["greedy"]
    with hasten.accelerated(model, PLAN, measure_speed=False):
        for way, settings in ways.items():
            assert torch.equal(generated(model, tokens, **settings), expected[way]), way


@pytest.mark.parametrize("family", ["lfm2", "lfm3"])
def test_assisted_decoding_of_convolutions(family):
    """Their last inputs are all that they keep, so that they can go back."""
    model, tokens = linear_models.build(family), ids(1, 30)
    expected = generated(model, tokens)
    hasten.accelerate(model, PLAN, measure_speed=False)
    assert torch.equal(generated(model, tokens, assistant_model=linear_models.build(family, seed=1)), expected)
    assert torch.equal(generated(model, tokens, prompt_lookup_num_tokens=3), expected)


@pytest.mark.parametrize("family", ["minimax", "qwen3_next", "kimi_linear", "falcon_h1"])
def test_a_left_padded_row_is_a_row_alone(family):
    model = linear_models.build(family)
    hasten.accelerate(model, PLAN, measure_speed=False)
    short, long = ids(1, 20, 1), ids(1, 33, 2)
    batch = torch.cat([torch.cat([torch.zeros(1, 13, dtype=torch.int64), short], 1), long])
    mask = torch.ones_like(batch)
    mask[0, :13] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        together = model(input_ids=batch, attention_mask=mask, position_ids=positions).logits
        alone = model(input_ids=short).logits
    assert distance(together[0, 13:], alone[0]) < 1e-4


@pytest.mark.parametrize("family", [*ONE_OF_EACH, "lfm2", "mamba", "falcon_mamba", "jamba", "zamba"])
def test_a_second_turn(family):
    """generate, then generate again with its cache and several new tokens."""
    model, first = linear_models.build(family), ids(1, 30)
    second = torch.cat([generated(model, first), ids(1, 20, 3)], 1)
    expected = generated(model, second)
    hasten.accelerate(model, PLAN, measure_speed=False)
    turn = generated(model, first, return_dict_in_generate=True)
    assert torch.equal(turn.sequences, second[:, :38])
    if family in ("mamba", "falcon_mamba", "mamba2"):  # whose caches count no tokens: what was read is not given again
        found = generated(model, second[:, 37:], cache_params=turn.past_key_values)
        assert torch.equal(found, expected[:, 37:])
    else:
        assert torch.equal(generated(model, second, past_key_values=turn.past_key_values), expected)


@pytest.mark.parametrize("family", ["qwen3_next", "lfm2", "mamba2", "minimax", "mamba", "zamba", "xlstm", "rwkv"])
def test_caches_move_between_the_stock_and_the_fast_model(family):
    """What one of them read, the other continues; transformers' scan of Mamba by single tokens alone."""
    model, tokens = linear_models.build(family), ids(rows(family, 2), 60)
    parts = 10 * [1] if family in ("mamba", "zamba") else [5, 1, 1, 1, 1, 1]
    fast = copy.deepcopy(model)
    hasten.accelerate(fast, PLAN, measure_speed=False)
    expected = read(model, tokens, [60])
    takes = inspect.signature(model.forward).parameters
    with torch.no_grad():
        for begin, then in ((model, fast), (fast, model)):
            if family == "minimax" and begin is model:
                continue  # refused
            cache = caches(begin(input_ids=tokens[:, :50], use_cache=True))
            cache = {name: value for name, value in cache.items() if name in takes}
            steps = [then(input_ids=part, use_cache=True, **cache).logits for part in tokens[:, 50:].split(parts, 1)]
            assert distance(torch.cat(steps, 1), expected[:, 50:]) < 2e-5


def test_nothing_global_changes():
    model, other = linear_models.build("qwen3_next"), linear_models.build("qwen3_next")
    module = sys.modules[type(model).__module__]
    before = dict(vars(module))
    hasten.accelerate(model, PLAN, measure_speed=False)
    assert dict(vars(module)) == before
    assert not any("forward" in vars(layer) for layer in other.modules())
    assert distance(logits(model, ids(), [112]), logits(other, ids(), [112])) < 2e-5


def test_a_copy_of_a_fast_model_is_fast_and_of_its_own():
    model = linear_models.build("mamba2")
    hasten.accelerate(model, PLAN, measure_speed=False)
    twin = copy.deepcopy(model)
    layer = next(module for module in twin.modules() if type(module).__name__ == "Mamba2Mixer")
    assert layer.forward.module is layer
    twin.backbone.layers[0].mixer.out_proj.weight.zero_()
    assert distance(logits(model, ids(), [112]), logits(twin, ids(), [112])) > 1e-3


@pytest.mark.parametrize("family", [*ONE_OF_EACH, "lfm2", "mamba", "zamba", "xlstm", "rwkv"])
def test_a_pickled_model_runs_the_kernels(family, calls):
    model, tokens = linear_models.build(family), ids(1, 20)
    report = hasten.accelerate(model, PLAN, measure_speed=False)
    expected = read(model, tokens, [18, 1, 1])
    pickled = pickle.dumps(model)
    hasten.revert(model)
    calls.clear()
    twin = pickle.loads(pickled)
    assert torch.equal(read(twin, tokens, [18, 1, 1]), expected)
    heads = 2 if family == "zamba" else 1
    assert counts_of(calls) == 3 * heads * len(report.techniques[0].edited), "the prefill and each step"
    hasten.revert(twin)
    assert torch.equal(read(twin, tokens, [18, 1, 1]), read(model, tokens, [18, 1, 1]))


def test_compiled_layers_call_the_kernels(calls):
    model = linear_models.build("mamba2")
    hasten.accelerate(model, PLAN, measure_speed=False)
    layer, x = model.backbone.layers[0].mixer, torch.randn(1, 30, 64)
    expected = layer(x)
    graphs = []

    def look(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.testing.assert_close(torch.compile(layer, backend=look)(x), expected)
    targets = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert any("hasten.linear_attention" in target for target in targets), targets


def test_minimax_in_bfloat16_keeps_its_state_in_float32():
    exact = linear_models.build("minimax").model.layers[0].self_attn
    layer = copy.deepcopy(exact).bfloat16()
    with torch.no_grad():
        for parameter, rounded in zip(exact.parameters(), layer.parameters(), strict=True):
            parameter.copy_(rounded)
    fast = minimax_adapters.minimax_forward(layer)
    theirs, ours = tf.models.minimax.modeling_minimax.MiniMaxCache(), tf.models.minimax.modeling_minimax.MiniMaxCache()
    states = tf.models.minimax.modeling_minimax.MiniMaxCache()
    x = torch.randn(1, 501, 64).bfloat16()
    with torch.no_grad():
        for t in range(501):
            token = x[:, t : t + 1]
            minimax_adapters.minimax_forward(exact)(exact, token.float(), None, None, states)
            layer(token, None, None, theirs)
            _, state = fast(layer, token, None, None, ours)
    assert state.dtype == torch.float32
    ratio = [
        float((found.linear_cache[0].float() - states.linear_cache[0]).norm() / states.linear_cache[0].norm())
        for found in (ours, theirs)
    ]
    assert ratio[0] < 0.01 < ratio[1], ratio


@pytest.mark.parametrize("family", ["mamba2", "minimax"])
def test_save_and_load(family, tmp_path):
    model = linear_models.build(family)
    report = hasten.accelerate(model, PLAN, measure_speed=False)
    hasten.save(model, tmp_path)
    loaded = hasten.load(tmp_path)
    assert distance(logits(loaded, ids(), [70, 41, 1]), logits(model, ids(), [70, 41, 1])) < 1e-6
    assert hasten.Plan.from_json(report.plan.to_json()) == report.plan
    hasten.revert(loaded)


def test_report():
    model = linear_models.build("falcon_h1")
    report = hasten.accelerate(model, PLAN, heldout=ids(1, 60))
    assert "FastLinearAttention(): 2 modules" in str(report) and "prefill" in str(report)
    assert report.drift.kl < 1e-6 and report.drift.top1 == 1
    assert report.to_dict()["techniques"][0]["edited"] == ["model.layers.0.mamba", "model.layers.1.mamba"]


def test_a_state_in_half_precision_is_updated_in_place():
    B, H, P, N = 2, 4, 16, 24
    x, dt, b, c = torch.randn(B, H, P), torch.rand(B, H, 1).expand(B, H, P), torch.randn(B, H, N), torch.randn(B, H, N)
    rates = -torch.rand(H, 1, 1).expand(H, P, N)
    exact = torch.randn(B, H, P, N)
    half = exact.bfloat16()
    before = half.clone()
    expected = mamba2_adapters.step_mamba2(exact, x, dt, rates, b, c)
    assert distance(mamba2_adapters.step_mamba2(half, x, dt, rates, b, c), expected) < 0.02
    assert half.dtype == torch.bfloat16 and distance(half.float(), exact) < 0.02 < distance(before.float(), exact)
