"""What the self-check makes of what edits saw of themselves."""

import contextlib

import pytest
import torch
from tiny_models import build, token_ids

from hasten.acceleration.edits import Edit, ReplaceForward, Verification, apply_all, undo_all
from hasten.acceleration.forwards import Forward
from hasten.acceleration.inference import Inference
from hasten.acceleration.self_check import LIMIT, TOKENS, self_check
from hasten.errors import HastenError, UnsupportedModelError


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
