"""NegToMe against a loop over tokens, and what tells the formula from the published matching."""

import pytest
import torch

from hasten.guidance.diffusion.negtome import negative_token_merging

ALPHA, THRESHOLD = 0.9, 0.3


def by_loops(tokens, reference):
    pushed = tokens.clone()
    for b, i in torch.cartesian_prod(torch.arange(tokens.shape[0]), torch.arange(tokens.shape[1])).tolist():
        cosines = [float(torch.cosine_similarity(tokens[b, i], r, dim=0)) for r in reference]
        if max(cosines) > THRESHOLD:
            pushed[b, i] = (1 + ALPHA) * tokens[b, i] - ALPHA * reference[cosines.index(max(cosines))]
    return pushed


def tokens():
    return torch.randn(3, 11, 6, dtype=torch.float64)


def test_every_token_leaves_its_best_match_in_the_reference():
    x, reference = tokens(), torch.randn(7, 6, dtype=torch.float64)
    pushed = negative_token_merging(x, reference, ALPHA, THRESHOLD)
    moved = (pushed != x).any(dim=-1)
    assert moved.any() and not moved.all()
    torch.testing.assert_close(pushed, by_loops(x, reference), rtol=0, atol=1e-13)


def test_the_first_image_is_its_own_reference_and_stays():
    x = tokens()
    pushed = negative_token_merging(x, alpha=ALPHA, threshold=THRESHOLD)
    torch.testing.assert_close(pushed[0], x[0], rtol=0, atol=1e-14)
    assert (pushed[1:] != x[1:]).any()


def as_published(tokens, reference):
    """The published implementation: its argmax runs over the image's own tokens."""
    unit = torch.nn.functional.normalize
    best = (unit(tokens, dim=-1) @ unit(reference, dim=-1).T).max(dim=-2)
    return torch.where(
        (best.values > THRESHOLD)[..., None], tokens + ALPHA * (tokens - reference[best.indices]), tokens
    )


def test_the_order_of_the_reference_matters_to_the_published_matching_alone():
    x, reference = tokens(), torch.randn(11, 6, dtype=torch.float64)
    shuffled = reference[torch.randperm(11)]
    ours = [negative_token_merging(x, r, ALPHA, THRESHOLD) for r in (reference, shuffled)]
    published = [as_published(x, r) for r in (reference, shuffled)]
    torch.testing.assert_close(ours[0], ours[1], rtol=0, atol=1e-14)
    assert not torch.allclose(published[0], published[1], atol=1e-3)
    assert not torch.allclose(ours[0], published[0], atol=1e-3)


def test_strengths_with_a_known_result():
    x, reference = tokens(), torch.randn(7, 6, dtype=torch.float64)
    assert torch.equal(negative_token_merging(x, reference, alpha=0.0, threshold=-1.0), x)
    assert torch.equal(negative_token_merging(x, reference, alpha=ALPHA, threshold=1.0), x)
    pulled = negative_token_merging(x, reference, alpha=-1.0, threshold=-1.0)
    nearest = torch.cdist(pulled, reference.expand(3, 7, 6)).min(dim=-1).values
    torch.testing.assert_close(nearest, torch.zeros_like(nearest), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(threshold=1.2), r"threshold must be a finite number in \[-1, 1\], got 1.2"),
        (dict(alpha=float("nan")), "alpha must be a finite number"),
        (dict(reference=torch.zeros(7, 5)), r"reference \[M, C\], got \(3, 11, 6\) and \(7, 5\)"),
    ],
)
def test_bad_input_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        negative_token_merging(tokens(), **given)
