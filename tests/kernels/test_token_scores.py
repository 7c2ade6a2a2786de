"""token_scores and gather_tokens on CPUs: every instruction set against the float64 definition, laws, errors,
torch.compile."""

import math

import pytest
import torch
from harness import assert_close, short

from hasten.kernels import backend, cpu
from hasten.kernels.token_scores import gather_tokens, op, reference, token_scores

# B, Q, H, G, T, D
SIZES = [
    (1, 1, 1, 1, 1, 1),
    (2, 1, 8, 8, 37, 64),
    (1, 1, 28, 4, 601, 128),
    (1, 3, 6, 2, 129, 72),
    (2, 20, 6, 2, 270, 80),
    (1, 1, 5, 1, 1000, 53),
    (1, 2, 8, 8, 16, 33),
]
MASKS = {
    "none": lambda B, Q, T: None,
    "of keys": lambda B, Q, T: torch.rand(B, T) > 0.3,
    "of queries": lambda B, Q, T: torch.rand(B, Q, T) > 0.6,
}
LAYOUTS = {
    "contiguous": lambda key: key,
    "a slice of a cache": lambda key: torch.cat([key, key], 2)[:, :, : key.shape[2]],
    "heads last": lambda key: key.transpose(1, 2).contiguous().transpose(1, 2),
    "backwards": lambda key: key.transpose(0, 2).contiguous().transpose(0, 2),
}
each_mask = pytest.mark.parametrize("mask", MASKS)


def inputs(B, Q, H, G, T, D, dtype=torch.float32, mask="none"):
    return torch.randn(B, Q, H, D).to(dtype), torch.randn(B, G, T, D).to(dtype), MASKS[mask](B, Q, T)


def definition(query, key, mask=None, scale=None, softcap=None):
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return reference.token_scores(query.double(), key.double(), mask, scale, softcap)


@pytest.mark.parametrize("softcap", [None, 0.5])
def test_the_definition_is_the_mean_of_attention(softcap):
    query, key, mask = inputs(2, 3, 4, 2, 7, 5, torch.float64, "of queries")
    mask[:, :, 0], mask[1, 2] = True, False
    expected = torch.zeros(2, 7, dtype=torch.float64)
    for b in range(2):
        some = [q for q in range(3) if mask[b, q].any()]
        for q in some:
            for h in range(4):
                logits = 0.3 * key[b, h // 2] @ query[b, q, h]
                logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
                exponentials = torch.where(mask[b, q], logits.exp(), 0)
                expected[b] += exponentials / exponentials.sum() / (4 * len(some))
    torch.testing.assert_close(definition(query, key, mask, 0.3, softcap), expected)
    whole = torch.ones(2, 7, dtype=torch.bool)
    torch.testing.assert_close(definition(query, key, whole), definition(query, key))
    torch.testing.assert_close(definition(query, key, mask[:, 0]), definition(query, key, mask[:, :1].expand(2, 3, 7)))


@pytest.mark.parametrize("size", SIZES, ids=short)
@each_mask
def test_is_the_definition(isa, dtype, size, mask, poisoned):
    query, key, allowed = inputs(*size, dtype, mask)
    scores = token_scores(query, key, allowed)
    assert scores.dtype == torch.float32
    assert_close(scores, definition(query, key, allowed))
    assert_close(token_scores(query, key, allowed, scale=0.7), definition(query, key, allowed, 0.7))
    capped = token_scores(query, key, allowed, scale=0.7, softcap=2.5)
    assert_close(capped, definition(query, key, allowed, 0.7, 2.5))


@pytest.mark.parametrize("softcap", [1e-3, 0.3, 50.0, 1e9])
def test_softcaps(isa, softcap):
    """Of logits far below and far above them."""
    query, key, mask = inputs(2, 2, 6, 2, 130, 40, mask="of queries")
    for scale in (1e-4, 0.2, 30.0):
        expected = definition(query, key, mask, scale, softcap)
        assert_close(token_scores(query, key, mask, scale=scale, softcap=softcap), expected)


def test_a_softcap_bounds_logits(isa):
    query, key, _ = inputs(1, 1, 2, 2, 40, 8)
    scores = token_scores(query * 1e15, key * 1e15, softcap=0.1)
    assert scores.max() / scores.min() < 1.0001 * math.exp(0.2)
    key[0, 1, 7, 3] = torch.nan
    assert token_scores(query, key, softcap=0.1).isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_change_no_bit(isa, layout):
    query, key, mask = inputs(2, 3, 6, 3, 150, 70, mask="of queries")
    expected = token_scores(query, key, mask)
    assert torch.equal(token_scores(query, LAYOUTS[layout](key), mask), expected)
    turned = query.transpose(1, 2).contiguous().transpose(1, 2), mask.mT.contiguous().mT
    assert torch.equal(token_scores(turned[0], key, turned[1]), expected)


def test_scores_of_expanded_keys_and_masks(isa):
    query, key, mask = inputs(3, 2, 4, 2, 60, 16, mask="of keys")
    one = key[:1].expand(3, 2, 60, 16), mask[:1].expand(3, 60)
    assert torch.equal(token_scores(query, *one), token_scores(query, *(x.contiguous() for x in one)))


@each_mask
def test_scores_add_up_to_one(isa, dtype, mask):
    query, key, allowed = inputs(3, 4, 4, 2, 300, 64, dtype, mask)
    scores = token_scores(query, key, allowed)
    torch.testing.assert_close(scores.sum(1), torch.ones(3))
    if mask == "of keys":
        assert not scores[~allowed].any() and scores[allowed].all()


def test_grouped_heads_are_repeated_keys(isa):
    query, key, _ = inputs(2, 2, 12, 3, 90, 32)
    repeated = token_scores(query, key.repeat_interleave(4, 1))
    torch.testing.assert_close(token_scores(query, key), repeated, rtol=1e-5, atol=1e-9)


def test_queries_and_rows_without_an_allowed_key(isa, poisoned):
    query, key, mask = inputs(3, 2, 4, 2, 50, 16, mask="of queries")
    mask[0, 0], mask[1] = False, False
    scores = token_scores(query, key, mask)
    assert_close(scores, definition(query, key, mask))
    assert not scores[1].any()
    torch.testing.assert_close(scores[0], token_scores(query[:1, 1:], key[:1], mask[:1, 1:])[0], rtol=1e-5, atol=1e-9)
    assert not token_scores(query, key, torch.zeros(3, 50, dtype=torch.bool)).any()


def test_what_is_masked_may_be_nan(isa):
    query, key, mask = inputs(2, 1, 4, 2, 90, 16, mask="of keys")
    expected = token_scores(query, key, mask)
    key.masked_fill_(~mask[:, None, :, None], torch.nan)
    assert torch.equal(token_scores(query, key, mask), expected)


def test_a_nan_stays_in_its_row(isa):
    query, key, _ = inputs(2, 1, 4, 2, 90, 16)
    clean = token_scores(query, key)
    key[1, 0, 7, 3] = torch.nan
    scores = token_scores(query, key)
    assert scores[1].isnan().all() and torch.equal(scores[0], clean[0])


@pytest.mark.parametrize("size", [1e4, 1e15])
def test_huge_logits(isa, size):
    query, key, _ = inputs(1, 1, 2, 2, 40, 8)
    query, key = query * size, key * size
    assert_close(token_scores(query, key, scale=1.0), definition(query, key, scale=1.0))


def test_sums_of_halves_do_not_overflow(isa):
    query, key = torch.full((1, 1, 2, 64), 200.0).half(), torch.full((1, 2, 5, 64), 200.0).half()
    torch.testing.assert_close(token_scores(query, key), torch.full((1, 5), 0.2))  # products of 2.6 million


@each_mask
def test_bits_do_not_depend_on_threads(isa, dtype, mask, threads):
    query, key, allowed = inputs(2, 3, 6, 2, 700, 72, dtype, mask)
    torch.set_num_threads(1)
    first = token_scores(query, key, allowed)
    for count in (2, 3, 5):
        torch.set_num_threads(count)
        assert torch.equal(token_scores(query, key, allowed), first)


def test_many_queries_and_float64_are_the_reference(monkeypatch):
    for Q, dtype in ((op.MOST_ROWS, torch.float32), (1, torch.float64)):
        query, key, mask = inputs(1, Q, 4, 2, 30, 8, dtype, "of queries")
        with monkeypatch.context() as patched:
            patched.setattr(cpu.Function, "__call__", lambda *arguments: pytest.fail("the compiled kernel ran"))
            scores = token_scores(query, key, mask)
        assert scores.dtype == dtype
        assert torch.equal(scores, reference.token_scores(query, key, mask, 8**-0.5))


@pytest.mark.parametrize(("B", "T"), [(0, 3), (2, 0)])
def test_empty(B, T):
    assert token_scores(torch.randn(B, 1, 4, 8), torch.randn(B, 2, T, 8)).shape == (B, T)


@each_mask
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_gradients_of_the_definition(mask, softcap):
    query, key, allowed = inputs(2, 2, 2, 1, 4, 3, torch.float64, mask)
    if mask == "of queries":
        allowed[0, 0] = False
    with backend.use("reference"):
        assert torch.autograd.gradcheck(
            lambda query, key: token_scores(query, key, allowed, softcap=softcap),
            (query.requires_grad_(), key.requires_grad_()),
        )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: {"query": a["query"][0]}, ValueError, r"query: expected shape \[B, Q, H, D\].* got shape \[3, 4, 8\]"),
        (lambda a: {"query": a["query"][:, :0]}, ValueError, r"Q, H and D of at least 1, got shape \[2, 0, 4, 8\]"),
        (lambda a: {"query": a["query"].long()}, TypeError, "query: expected a floating dtype .* got torch.int64"),
        (lambda a: {"key": a["key"][..., :7]}, ValueError, r"key: expected shape \[2, G, T, 8\], got shape \[2, 2, 9, 7\]"),
        (lambda a: {"key": a["key"][:1]}, ValueError, r"key: expected shape \[2, G, T, 8\], got shape \[1, 2, 9, 8\]"),
        (lambda a: {"key": a["key"][:, [0, 1, 1]]}, ValueError, "key: .* divides the 4 of query, got 3 heads"),
        (lambda a: {"key": a["key"][:, :0]}, ValueError, "key: .* divides the 4 of query, got 0 heads"),
        (lambda a: {"key": a["key"].half()}, TypeError, "key: expected torch.float32, the dtype of query, got torch.float16"),
        (lambda a: {"key": a["key"].mT.contiguous().mT}, ValueError, r"key: .* stride 1, got strides \(144, 72, 1, 9\)"),
        (lambda a: {"mask": a["mask"].float()}, TypeError, "mask: expected torch.bool, got torch.float32"),
        (lambda a: {"mask": a["mask"][:, 1:]}, ValueError, r"mask: expected shape \[2, 9\] or \[2, 3, 9\], got shape \[2, 8\]"),
        (lambda a: {"mask": a["mask"].to("meta")}, ValueError, "mask: expected on cpu, the device of query, got meta"),
        (lambda a: {"scale": "1"}, TypeError, "scale: expected a number, got '1'"),
        (lambda a: {"scale": float("inf")}, ValueError, "scale: expected a finite number, got inf"),
        (lambda a: {"softcap": "1"}, TypeError, "softcap: expected a number, got '1'"),
        (lambda a: {"softcap": float("nan")}, ValueError, "softcap: expected a finite number, got nan"),
        (lambda a: {"softcap": 0.0}, ValueError, "softcap: expected a positive float32, got 0.0"),
        (lambda a: {"softcap": -50}, ValueError, "softcap: expected a positive float32, got -50"),
        (lambda a: {"softcap": 1e-50}, ValueError, "softcap: expected a positive float32, got 1e-50"),
    ],
)  # fmt: skip
def test_errors(change, error, message):
    query, key, mask = inputs(2, 3, 4, 2, 9, 8, mask="of keys")
    arguments = {"query": query, "key": key, "mask": mask}
    with pytest.raises(error, match=message):
        token_scores(**arguments | change(arguments))


def chosen(B=2, T=19):
    """Tensors of several kinds, and columns [B, 5]."""
    tensors = [
        torch.randn(B, T, 70).bfloat16(),
        torch.randn(1, T, 6),
        torch.arange(B * T).view(B, T),
        torch.rand(B, T, 3) > 0.5,
        torch.randn(B, T, 2, 3).double(),
        torch.randn(B, T, 4).to(torch.float8_e4m3fn),
        torch.randn(B, T, 0),
    ]
    return tensors, torch.stack([torch.randperm(T)[:5], torch.tensor([T - 1, 0, 3, 3, 7])])[:B]


@pytest.mark.parametrize("B", [1, 2])
def test_gathers_rows(B, poisoned):
    tensors, columns = chosen(B)
    found = gather_tokens(tensors, columns)
    for y, x in zip(found, tensors, strict=True):
        assert y.dtype == x.dtype and y.shape == (B, 5, *x.shape[2:]) and y.is_contiguous()
        for b in range(B):
            for i in range(5):
                assert y[b, i].equal(x[b if len(x) > 1 else 0, columns[b, i]])


def test_gathers_from_views():
    wide = torch.randn(2, 40, 12)
    views = [wide[:, 1:20], wide[:, :38:2, 1:8], wide[:, :19].mT.contiguous().mT, wide[:1].expand(2, 40, 12)[:, 5:24]]
    positions = torch.arange(3 * 2 * 19).view(3, 2, 19)
    columns = torch.tensor([[3, 9], [18, 0]])
    found = gather_tokens([*views, positions.movedim(0, -1)], columns)
    for y, x in zip(found, views, strict=False):
        assert torch.equal(y, torch.stack([x[b, columns[b]] for b in range(2)]))
    assert torch.equal(found[-1].movedim(-1, 0), positions.gather(2, columns.expand(3, 2, 2)))


def test_gathers_nothing():
    hidden, positions = gather_tokens([torch.randn(2, 5, 4), torch.zeros(2, 5)], torch.zeros(2, 0, dtype=torch.int64))
    assert hidden.shape == (2, 0, 4) and positions.shape == (2, 0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: {"tensors": []}, ValueError, "tensors: expected at least one tensor, got none"),
        (lambda a: {"tensors": [a["tensors"][0], 3]}, TypeError, r"tensors\[1\]: expected a tensor, got 3"),
        (lambda a: {"tensors": [torch.zeros(5)]}, ValueError, r"tensors\[0\]: expected shape \[2, T, ...\].* got shape \[5\]"),
        (
            lambda a: {"tensors": [torch.zeros(2, 9), torch.zeros(2, 8)]},
            ValueError,
            r"tensors\[1\]: expected shape \[2, 9, ...\] or \[1, 9, ...\], got shape \[2, 8\]",
        ),
        (lambda a: {"tensors": [torch.zeros(3, 19)]}, ValueError, r"tensors\[0\]: .* got shape \[3, 19\]"),
        (
            lambda a: {"tensors": [torch.zeros(2, 19, dtype=torch.complex64)]},
            TypeError,
            r"tensors\[0\]: expected a dtype that is not complex, got torch.complex64",
        ),
        (lambda a: {"columns": None}, TypeError, "columns: expected a tensor, got None"),
        (lambda a: {"columns": a["columns"][0]}, ValueError, r"columns: expected shape \[B, n\], got shape \[5\]"),
        (lambda a: {"columns": a["columns"].int()}, TypeError, "columns: expected torch.int64, got torch.int32"),
        (lambda a: {"columns": a["columns"].to("meta")}, ValueError, r"columns: .* device of tensors\[0\], got meta"),
        (lambda a: {"columns": a["columns"] + 1}, ValueError, "columns: expected values from 0 to 18, got 19"),
        (lambda a: {"columns": a["columns"] - 1}, ValueError, "columns: expected values from 0 to 18, got -1"),
    ],
)  # fmt: skip
def test_errors_of_gathering(change, error, message):
    tensors, columns = chosen()
    arguments = {"tensors": tensors, "columns": columns}
    with pytest.raises(error, match=message):
        gather_tokens(**arguments | change(arguments))


def test_gathering_has_gradients_as_reference_only():
    x, columns = torch.randn(1, 5, 2, requires_grad=True), torch.tensor([[3, 3, 0]])
    with pytest.raises(NotImplementedError, match=r"tensors\[1\] requires grad, .* torch\.no_grad\(\)"):
        gather_tokens([torch.zeros(1, 5), x], columns)
    with backend.use("reference"):
        gather_tokens([x], columns)[0].sum().backward()
    assert x.grad[0, :, 0].tolist() == [1, 0, 0, 2, 0]


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles(compiler, can_compile):
    query, key, mask = inputs(2, 1, 4, 2, 30, 8, mask="of keys")
    hidden, positions = torch.randn(2, 30, 5), torch.arange(30)[None]

    def select(query, key, mask):
        scores = token_scores(query, key, mask, softcap=3.0)
        kept, places = gather_tokens([hidden, positions], scores.topk(7).indices.sort().values)
        return kept + 1, places

    compiled = torch.compile(select, fullgraph=True, backend=compiler)
    for found, expected in zip(compiled(query, key, mask), select(query, key, mask), strict=True):
        torch.testing.assert_close(found, expected)


@each_mask
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=short)
def test_are_well_made_torch_operators(dtype, mask):
    query, key, allowed = inputs(2, 3, 4, 2, 30, 8, dtype, mask)
    torch.library.opcheck(torch.ops.hasten.token_scores.default, (query, key, allowed, None, 2.0))
    tensors, columns = chosen()
    torch.library.opcheck(torch.ops.hasten.gather_tokens.default, (tensors[:5], columns))
