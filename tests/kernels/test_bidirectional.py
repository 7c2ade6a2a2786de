"""Bidirectional linear attention: three forms of one map, against the formula written out in loops; its laws and
errors."""

import math

import pytest
import torch
from harness import assert_close

from hasten.kernels import backend
from hasten.kernels.recurrence.linear_attention import bidirectional, bidirectional_linear_attention
from hasten.kernels.recurrence.linear_attention.features import elu_plus_one

LENGTHS = (1, 63, 64, 65, 130)
DECAYS = ("none", "per head", "per token", "-50", "0", "-inf", "-inf among others")


def inputs(B=1, T=65, H=1, K=5, Hv=None, V=3, dtype=torch.float64):
    Hv = Hv or H
    q, k = elu_plus_one(torch.randn(B, T, H, K)).to(dtype), elu_plus_one(torch.randn(B, T, H, K)).to(dtype)
    return q, k, torch.randn(B, T, Hv, V).to(dtype)


def draw_decay(kind, B, T, Hv):
    if kind == "none":
        return None
    if kind == "per head":
        return -torch.rand(Hv, dtype=torch.float64)
    decay = -torch.rand(B, T, Hv, dtype=torch.float64)
    if kind == "-inf among others":
        decay[torch.rand_like(decay) < 0.1] = -math.inf
    elif kind != "per token":
        decay = torch.full_like(decay, float(kind))
    return decay


def forms(q, k, v, **options):
    return {form: bidirectional_linear_attention(q, k, v, form=form, **options) for form in bidirectional.FORMS}


@pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "plain"])
@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("T", LENGTHS)
def test_the_forms_agree(T, kind, normalize):
    q, k, v = inputs(T=T)
    # Chunks take differences of sums of decays, -inf among them as -1e4: 64e4 leaves 1e-10 of a difference in float64.
    tolerance = 1e-10 if kind == "-inf among others" else 1e-12
    found = forms(q, k, v, decay=draw_decay(kind, 1, T, 1), normalize=normalize)
    for form in ("recurrent", "chunked"):
        torch.testing.assert_close(found[form], found["full"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", DECAYS[:-1])
def test_the_forms_agree_with_batches_and_grouped_heads(kind):
    q, k, v = inputs(B=2, T=70, H=2, Hv=6)
    found = forms(q, k, v, decay=draw_decay(kind, 2, 70, 6))
    for form in ("recurrent", "chunked"):
        torch.testing.assert_close(found[form], found["full"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", bidirectional.FORMS)
def test_is_the_formula(form):
    q, k, v = inputs(B=2, T=7, H=2)
    decay = draw_decay("per token", 2, 7, 2)
    a, o = decay.exp(), bidirectional_linear_attention(q, k, v, decay=decay, form=form)
    for b in range(2):
        for h in range(2):
            for i in range(7):
                M = [math.prod(a[b, j:i, h]) if i >= j else math.prod(a[b, i + 1 : j + 1, h]) for j in range(7)]
                weight = torch.stack([m * (q[b, i, h] @ k[b, j, h]) for j, m in enumerate(M)])
                torch.testing.assert_close(o[b, i, h], weight @ v[b, :, h] / weight.sum())


@pytest.mark.parametrize("form", bidirectional.FORMS)
def test_reversed_tokens_give_reversed_outputs(form):
    q, k, v = inputs(T=70, H=2)
    decay = draw_decay("per head", 1, 70, 2)
    o = bidirectional_linear_attention(q, k, v, decay=decay, form=form)
    flipped = bidirectional_linear_attention(q.flip(1), k.flip(1), v.flip(1), decay=decay, form=form)
    torch.testing.assert_close(flipped.flip(1), o, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", bidirectional.FORMS)
def test_without_decay_the_order_of_the_others_is_nothing(form):
    q, k, v = inputs(T=70)
    order = torch.randperm(70)
    o = bidirectional_linear_attention(q, k, v, form=form)
    torch.testing.assert_close(
        bidirectional_linear_attention(q[:, order], k[:, order], v[:, order], form=form), o[:, order]
    )


@pytest.mark.parametrize("form", bidirectional.FORMS)
def test_where_nothing_passes_every_token_sees_itself(form):
    q, k, v = inputs(T=70)
    decay = torch.full((1,), -math.inf)
    torch.testing.assert_close(bidirectional_linear_attention(q, k, v, decay=decay, form=form), v)


@pytest.mark.parametrize("form", bidirectional.FORMS)
def test_equal_values_come_out_as_they_are(form):
    q, k, _ = inputs(T=70, H=2)
    v = torch.randn(3, dtype=torch.float64).expand(1, 70, 2, 3)
    torch.testing.assert_close(bidirectional_linear_attention(q, k, v, decay=torch.tensor([-0.1, -2.0]), form=form), v)


@pytest.mark.parametrize("form", bidirectional.FORMS)
@pytest.mark.parametrize("kind", DECAYS)
def test_dtypes(form, kind, dtype):
    q, k, v = inputs(B=2, T=130, H=2, K=16, V=24, dtype=dtype)
    decay = draw_decay(kind, 2, 130, 2)
    o = bidirectional_linear_attention(q, k, v, decay=decay, form=form)
    assert o.dtype == dtype
    expected = bidirectional_linear_attention(q.double(), k.double(), v.double(), decay=decay, form="full")
    assert_close(o, expected)


def test_half_precision_does_not_overflow():
    q, k, v = inputs(T=300, K=32, dtype=torch.float16)
    o = bidirectional_linear_attention(5 * q, 5 * k, v)
    assert o.isfinite().all()


def test_a_nan_stays_in_its_row():
    q, k, v = inputs(B=3, T=70, dtype=torch.float32)
    v[1, 3] = torch.nan
    for form, o in forms(q, k, v, decay=torch.tensor([-0.1])).items():
        assert o[[0, 2]].isfinite().all() and o[1].isnan().all(), form


@pytest.mark.parametrize("form", bidirectional.FORMS)
def test_gradients(form):
    q, k, v = (x.requires_grad_() for x in inputs(T=5))
    decay = draw_decay("per token", 1, 5, 1).requires_grad_()
    call = lambda q, k, v, decay: bidirectional_linear_attention(q, k, v, decay=decay, form=form)  # noqa: E731 (gradcheck's)
    with backend.use("reference"):
        assert torch.autograd.gradcheck(call, (q, k, v, decay))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "causal"}, "form: expected one of chunked, full, recurrent, got 'causal'"),
        ({"decay": torch.zeros(3)}, r"decay: expected shape \[2\] or \[1, 8, 2\], got shape \[3\]"),
        ({"decay": torch.zeros(1, 8, 2, 4)}, r"decay: expected shape \[2\] or .* got shape \[1, 8, 2, 4\]"),
        ({"decay": torch.tensor([0.5, 0.0])}, "decay: expected logarithms of at most 0, got 0.5"),
        ({"v": torch.randn(1, 8, 3, 4)}, "v: expected a multiple of the 2 heads of q and k, got 3 heads"),
        ({"k": torch.randn(1, 8, 2, 5)}, r"k: expected \[1, 8, 2, 4\], the shape of q, got shape \[1, 8, 2, 5\]"),
        ({"q": torch.randn(8, 2, 4)}, r"q: expected shape \[B, T, H, K\], got shape \[8, 2, 4\]"),
    ],
)
def test_errors(change, message):
    arguments = {"q": torch.randn(1, 8, 2, 4), "k": torch.randn(1, 8, 2, 4), "v": torch.randn(1, 8, 2, 4)}
    with pytest.raises(ValueError, match=message):
        bidirectional_linear_attention(**arguments | change)
