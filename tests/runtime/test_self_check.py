"""What the self-check makes of what edits saw of themselves."""

import contextlib
from functools import partial

import linear_models
import pytest
import torch
import transformers as tf
from tiny_models import GROUPED, build, token_ids

import hasten
from hasten.acceleration.anatomy import Anatomy
from hasten.acceleration.edits import Edit, ReplaceForward, Verification, apply_all, undo_all
from hasten.acceleration.forwards import Forward
from hasten.acceleration.inference import Inference
from hasten.acceleration.self_check import LIMIT, TOKENS, self_check
from hasten.errors import HastenError, UnsupportedModelError
from hasten.kernels import backend


class Seeing(Edit):
    """An edit that computes nothing, and sees each of `pairs` of what was written and what should have been."""

    def __init__(self, *pairs):
        self.name, self.pairs, self.lengths = "part", pairs, []

    @contextlib.contextmanager
    def verify(self, model):
        seen = Verification(self.name)
        handle = model.get_input_embeddings().register_forward_pre_hook(
            lambda module, x: self.lengths.append(x[0].shape[1])
        )
        yield seen
        handle.remove()
        for written, expected in self.pairs:
            seen.add(written, expected)


class Outer(Forward):
    def own(self, x):
        return self.dense(x)


class Inner(Outer):
    calls = 0

    def own(self, x):
        type(self).calls += 1
        return self.dense(x)


def test_a_module_is_compared_without_what_is_changed_inside_it():
    """Which decides by the last bit of its inputs what it skips, and is compared by itself."""
    model = build("llama")
    outer, inner = (
        ReplaceForward(f"model.layers.0.mlp{name}", kind) for name, kind in (("", Outer), (".up_proj", Inner))
    )
    apply_all(model, [outer, inner], done := [])
    for edit, calls in ((outer, 1), (inner, 3)):
        Inner.calls = 0
        with edit.verify(model) as seen:
            model(token_ids(1, 5))
        assert (seen.calls, seen.distance, Inner.calls) == (1, 0.0, calls)
    undo_all(model, done)


CACHES = {
    "dynamic": partial(build, "llama"),
    "sliding": lambda: tf.MistralForCausalLM(tf.MistralConfig(**GROUPED, sliding_window=8)).eval(),
    "states": partial(linear_models.build, "mamba2"),
    "both": partial(linear_models.build, "bamba"),
    "encoder-decoder": lambda: tf.BartForConditionalGeneration(
        tf.BartConfig(
            d_model=32,
            vocab_size=300,
            **dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads"), 2),
            **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
            decoder_attention_heads=2,
        )
    ).eval(),
}


class Same(Forward):
    def own(self, *arguments, **keywords):
        return self.dense(*arguments, **keywords)


@pytest.mark.parametrize("cache", CACHES)
def test_what_reads_and_writes_a_cache_is_called_twice_on_the_same(cache):
    model = CACHES[cache]().requires_grad_(False)
    layers = [block.name for block in Anatomy(model).blocks]
    attention = [
        name
        for name, module in model.named_modules()
        if "Attention" in type(module).__name__ and name.startswith(tuple(layers))
    ]
    for names in (layers, attention):
        edits = [ReplaceForward(name, Same) for name in names]
        apply_all(model, edits, done := [])
        if edits:
            assert self_check(Inference(model), {"Same": edits}) == 0.0
        undo_all(model, done)


def test_the_self_check_of_a_layer_leaves_a_static_cache_as_it_was():
    model, ids = build("llama"), token_ids(1, 8)
    edits = [ReplaceForward(f"model.layers.{i}", Same) for i in range(2)]
    caches = [tf.StaticCache(model.config, max_cache_len=16) for _ in range(2)]
    expected = model(ids, past_key_values=caches[0]).logits
    apply_all(model, edits, [])
    with contextlib.ExitStack() as stack:
        seen = [stack.enter_context(edit.verify(model)) for edit in edits]
        assert torch.equal(model(ids, past_key_values=caches[1]).logits, expected)
    assert [verification.distance for verification in seen] == [0.0, 0.0]
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(*(layer.keys for layer in layers))
        assert [int(layer.get_seq_length()) for layer in layers] == [8, 8]


class Adding(Same):
    """Writes other keys than its definition does."""

    def own(self, *arguments, **keywords):
        output = self.dense(*arguments, **keywords)
        keywords["past_key_values"].layers[self.module.layer_idx].keys += 0 if backend.is_reference() else 1
        return output


def test_what_a_call_leaves_in_a_cache_is_compared():
    model = build("llama")
    apply_all(model, edits := [ReplaceForward("model.layers.0.self_attn", Adding)], [])
    with pytest.raises(HastenError, match=r"model\.layers\.0\.self_attn differs from its definition"):
        self_check(Inference(model), {"Adding": edits})


def check(*edits):
    return self_check(Inference(build("llama")), {"Technique": edits})


def away(distance, dtype=torch.float32, parts=3):
    """An output at `distance` from a definition, relative, and that definition."""
    definition = torch.zeros(4, dtype=torch.float64)
    definition[0] = 2
    output = definition.clone()
    output[parts] = 2 * distance
    return output.to(dtype), definition.to(dtype)


def test_a_prefill_and_a_step_are_run():
    edit = Seeing(away(0.0))
    assert check(edit, Edit()) == 0.0
    assert edit.lengths == [TOKENS, 1]
    assert check(Edit()) is None


def test_a_report_of_what_does_not_verify_itself_says_so():
    report = hasten.Report(hasten.Plan(hasten.DenseDecode()), [], 1, 1, None)
    assert "check    nothing to check: no edit verifies itself" in str(report)
    report.self_check = 1e-6
    assert "check    kernels agree with their definition to 1.0e-06" in str(report)


def test_cats_says_that_experts_are_fused():
    with pytest.raises(UnsupportedModelError, match=r"are fused experts \(model.layers.0.mlp.experts\).*hasten.Wina"):
        hasten.Cats(0.5).targets(Anatomy(build("mixtral")))


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
def test_distances_over_the_limit_are_an_error(dtype):
    assert check(Seeing(away(0.9 * LIMIT[dtype], dtype))) == pytest.approx(0.9 * LIMIT[dtype], rel=0.01)
    with pytest.raises(HastenError, match=r"part differs from its definition by .* \(relative\); the model was left"):
        check(Seeing(away(0.0, dtype), away(1.1 * LIMIT[dtype], dtype), away(0.0, dtype)))


def test_the_largest_distance_is_returned():
    assert check(Seeing(away(1e-5)), Seeing(away(3e-5), away(2e-5)), Seeing(away(1e-6))) == pytest.approx(
        3e-5, rel=0.01
    )


def test_a_technique_of_which_nothing_runs_is_refused():
    inference, idle = Inference(build("llama")), Seeing()
    assert self_check(inference, {"Busy": [Seeing(away(1e-6)), idle], "Preparing": [Edit()]}) > 0
    with pytest.raises(UnsupportedModelError, match="Idle would change nothing: no decode step runs what it installs;"):
        self_check(inference, {"Busy": [Seeing(away(1e-6))], "Idle": [idle]})


def test_everything_that_a_call_writes_counts():
    right, wrong = away(0.0), away(0.5)
    nested = (right[0], [torch.arange(3), {"state": wrong[0]}]), (right[1], [torch.arange(3), {"state": wrong[1]}])
    with pytest.raises(HastenError, match="differs"):
        check(Seeing(nested))


def test_nan_and_overflow():
    output, definition = away(0.0)
    broken = definition.clone()
    broken[1] = torch.nan
    with pytest.raises(HastenError, match="part differs from its definition by nan"):
        check(Seeing((broken, definition), (output, definition)))
    broken[1] = torch.inf
    with pytest.raises(HastenError, match=r"part overflows in torch.float32 by its definition too; the model was left"):
        check(Seeing((output, definition), (broken, broken), (output, definition)))
