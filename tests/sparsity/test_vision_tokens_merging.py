import math

import pytest
import torch

from hasten.sparsity.vision_tokens import bipartite_merging, identical_rows, random_scores, text_raters
from hasten.sparsity.vision_tokens.duplicates import _grouped

# ---- merging


@pytest.mark.parametrize("count", [1, 2, 3, 10, 18, 36, 37, 100])
@pytest.mark.parametrize("masked", [False, True])
def test_merging_conserves_the_sum_and_the_sizes(count, masked):
    B, T, D = 3, 37, 8
    x = torch.randn(B, T, D)
    mask = torch.rand(B, T) < 0.7 if masked else None
    before = torch.randint(1, 5, (B, T))
    taking_part = mask if masked else torch.ones(B, T, dtype=torch.bool)
    for row, merging in enumerate(bipartite_merging(x, count, mask, before)):
        others = T - int(taking_part[row].sum())
        assert len(merging.columns) == others + min(count, T - others)
        assert torch.equal(merging.columns, merging.columns.unique()), "rising, each once"
        assert torch.equal(merging.into[merging.columns], torch.arange(len(merging.columns)))
        assert torch.equal(
            merging.into[~taking_part[row]], torch.searchsorted(merging.columns, torch.arange(T))[~taking_part[row]]
        )
        assert int(merging.sizes.sum()) == int(before[row].sum())
        average = merging.average(x[row], before[row])
        torch.testing.assert_close(
            (average * merging.sizes[:, None]).sum(0), (x[row] * before[row, :, None]).sum(0), rtol=1e-5, atol=1e-5
        )
        for place, column in enumerate(merging.columns):
            members = merging.into == place
            assert merging.sizes[place] == before[row][members].sum()
            weights = before[row][members, None] / merging.sizes[place]
            torch.testing.assert_close(average[place], (x[row][members] * weights).sum(0), rtol=1e-5, atol=1e-6)
            assert members.sum() == 1 or taking_part[row][members].all(), f"column {column} merged with what does not"


def test_every_row_has_a_count_of_its_own():
    x = torch.randn(3, 20, 4)
    merged = bipartite_merging(x, torch.tensor([3, 20, 11]))
    assert [len(merging.columns) for merging in merged] == [3, 20, 11]
    for row, count in enumerate((3, 20, 11)):
        alone = bipartite_merging(x[row : row + 1], count)[0]
        assert torch.equal(alone.into, merged[row].into)
    assert torch.equal(merged[1].into, torch.arange(20)) and torch.equal(merged[1].average(x[1]), x[1])


def test_identical_tokens_merge_first():
    """Tokens 0 and 1, 2 and 3, ... are copies but for their length, which the cosine does not see."""
    basis = torch.eye(8) + 0.1 * torch.randn(8, 8)
    x = torch.stack([basis, 3 * basis], 1).flatten(0, 1)[None]
    merging = bipartite_merging(x, 8)[0]
    assert merging.into.tolist() == [pair for pair in range(8) for _ in range(2)]
    torch.testing.assert_close(merging.average(x[0]), 2 * basis)
    x[0, 4:] = torch.randn(12, 8)
    assert bipartite_merging(x, 14)[0].sizes.tolist()[:2] == [2, 2]


def test_one_round_merges_the_best_pairs():
    """By the definition, in loops."""
    x = torch.randn(1, 11, 5)
    even, odd = range(0, 11, 2), range(1, 11, 2)
    cosine = torch.nn.functional.cosine_similarity
    edges = []
    for token in even:
        similar, partner = max((float(cosine(x[0, token], x[0, other], dim=0)), other) for other in odd)
        edges.append((similar, token, partner))
    expected = list(range(11))
    for _, token, partner in sorted(edges, reverse=True)[:4]:
        expected[token] = partner
    merging = bipartite_merging(x, 7)[0]
    assert merging.columns[merging.into].tolist() == expected


def test_averages_have_the_dtype_of_what_is_averaged():
    x = torch.randn(1, 6, 4, dtype=torch.bfloat16)
    merging = bipartite_merging(x, 1)[0]
    assert merging.average(x[0]).dtype == torch.bfloat16
    assert torch.equal(merging.average(x[0]), x[0].float().mean(0, keepdim=True).bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, r"at least one token must remain of each row, got \[0, 0\]"),
        ({"count": torch.tensor([3])}, r"count must be \[2\], got \[1\]"),
        ({"mask": torch.ones(2, 4)}, r"mask must be \[2, 5\], got \[2, 4\]"),
        ({"sizes": torch.ones(5)}, r"sizes must be \[2, 5\], got \[5\]"),
        ({"x": torch.ones(5, 3)}, r"x must be \[B, T, D\], got \[5, 3\]"),
    ],
)
def test_merging_refuses_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        bipartite_merging(**({"x": torch.ones(2, 5, 3), "count": 2} | change))


# ---- duplicates


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 5), (7,), (8,), (), (0,)], ids=str)
def test_identical_rows_are_found(dtype, shape):
    kinds = (torch.randn(4, *shape) * 100).to(dtype)
    x = kinds[[2, 0, 2, 1, 0, 0, 3]]
    unique, inverse = identical_rows(x)
    assert torch.equal(x[unique][inverse], x)
    expected = torch.unique(x.flatten(1) if x.dim() > 1 else x[:, None], dim=0) if x.numel() else x[:1]
    assert len(unique) == len(expected)
    assert unique.tolist() == sorted(unique.tolist())
    for kind, row in enumerate(unique.tolist()):
        assert inverse.tolist().index(kind) == row, "the first row of its kind"


def test_rows_are_compared_by_their_bits():
    x = torch.tensor([0.0, -0.0, math.nan, 0.0, math.nan])
    unique, inverse = identical_rows(x)
    assert (unique.tolist(), inverse.tolist()) == ([0, 1, 2], [0, 1, 2, 0, 2])
    near = torch.ones(3, 1000)
    near[1, 999] = torch.nextafter(near[1, 999], torch.tensor(2.0))
    assert identical_rows(near)[1].tolist() == [0, 1, 0]


def test_a_collision_of_hashes_is_no_error():
    words = torch.tensor([5, 7, 5, 9, 7, 9, 5])[:, None]
    for hashes in (torch.zeros(7, dtype=torch.int64), torch.tensor([1, 1, 1, 2, 1, 2, 1]), words.flatten()):
        unique, inverse = _grouped(words, hashes)
        assert (unique.tolist(), inverse.tolist()) == ([0, 1, 3], [0, 1, 0, 2, 1, 2, 0])


def test_no_rows_and_views():
    unique, inverse = identical_rows(torch.ones(0, 3, 4))
    assert len(unique) == len(inverse) == 0
    x = torch.arange(12).view(3, 4).mT[:, ::2]
    assert identical_rows(x)[0].tolist() == [0, 1, 2, 3]
    assert identical_rows(x.mT[:, :1])[0].tolist() == [0, 1]
    with pytest.raises(ValueError, match="at least one dimension, of rows, got a scalar"):
        identical_rows(torch.tensor(1.0))


# ---- raters


@pytest.mark.parametrize("masked", [False, True])
def test_raters_are_the_text_tokens_above_the_mean(masked):
    """By the definition, in loops over the tokens that a row has."""
    B, V, T, D = 3, 9, 7, 5
    image, text = torch.randn(B, V, D), torch.randn(B, T, D)
    image_mask, text_mask = torch.rand(B, V) < 0.6, torch.rand(B, T) < 0.6
    image_mask[:, 0] = text_mask[:, 0] = True
    found = text_raters(image, text, image_mask, text_mask) if masked else text_raters(image, text)
    for row in range(B):
        seen = image[row][image_mask[row]] if masked else image[row]
        words = text_mask[row].nonzero().flatten() if masked else torch.arange(T)
        ratings = (seen @ text[row][words].mT).softmax(-1).mean(0)
        expected = torch.zeros(T, dtype=torch.bool)
        expected[words[ratings > ratings.mean()]] = True
        assert torch.equal(found[row], expected)


def test_there_is_always_a_rater():
    found = text_raters(torch.randn(2, 4, 3), torch.randn(2, 1, 3))
    assert found.all()
    alike = text_raters(torch.ones(1, 4, 3), torch.ones(1, 4, 3))
    assert alike.sum() >= 1


def test_raters_refuse_what_does_not_fit():
    image, text = torch.ones(2, 4, 3), torch.ones(2, 5, 3)
    with pytest.raises(ValueError, match=r"text must be \[2, 5, 3\], got \[2, 5, 4\]"):
        text_raters(image, torch.ones(2, 5, 4))
    with pytest.raises(ValueError, match=r"text_mask must be \[2, 5\], got \[2, 4\]"):
        text_raters(image, text, text_mask=torch.ones(2, 4, dtype=torch.bool))
    mask = torch.tensor([[True] * 4, [False] * 4])
    with pytest.raises(ValueError, match=r"every row needs image tokens, got \[4, 0\] of them"):
        text_raters(image, text, image_mask=mask)


def test_random_scores_are_those_of_their_seed():
    state = torch.get_rng_state()
    scores = random_scores(3, 2, 50)
    assert torch.equal(torch.get_rng_state(), state)
    assert scores.shape == (2, 50) and torch.equal(scores, random_scores(3, 2, 50))
    assert not torch.equal(scores, random_scores(4, 2, 50)) and not torch.equal(scores[0], scores[1])
