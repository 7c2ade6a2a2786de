"""What pruning tokens of a prompt takes: scores by the attention of few queries, and the kept rows of what belongs to
each token."""

from collections.abc import Sequence

import torch

from .. import backend, checks
from . import cpu, reference

MOST_ROWS = 64  # queries times heads on one head of keys: with more, torch's matrix product is faster on CPUs

_library = torch.library.Library("hasten", "FRAGMENT")
_library.define("token_scores(Tensor query, Tensor key, Tensor? mask, float? scale, float? softcap) -> Tensor")
_library.define("gather_tokens(Tensor[] tensors, Tensor columns) -> Tensor[]")


def token_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """query [B, Q, H, D], key [B, G, T, D] -> scores [B, T]: the attention that each key receives, softmax over T of
    scale * q . k, as the mean over H heads and Q queries.

    With one query it is how FastV ranks image tokens (the last token of the prompt, Chen et al. 2024,
    arXiv:2403.06764), with those of a text SparseVLM's (its raters, Zhang et al. 2025, arXiv:2410.04417). Every key is
    read once and no attention matrix but the logits [B, Q, H, T] is made. Scores are float32, those of a row add up to
    1; float64 runs as the reference and stays float64.

    Args:
        query: float32, float16 or bfloat16 (summed in float32), already rotated; of any strides.
        key: as the cache holds them, of query's dtype; H is a multiple of G, and head h reads the keys of
            h // (H // G). Any strides but the last, which is 1.
        mask: bool [B, T], or [B, Q, T] with a row for each query; True where a query may attend. None for everywhere.
            What is masked scores 0. A query without any allowed key is left out of the mean, and a row of the batch
            without any such query is 0.
        scale: of the products; None for D ** -0.5.
        softcap: logits are softcap * tanh(scale * q . k / softcap), as Gemma 2's (arXiv:2408.00118); None for plain
            ones.

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: shapes, devices or strides that do not fit, a scale that is not finite, or a softcap that is no
            positive float32.
        NotImplementedError: an input that requires grad (see `hasten.kernels.checks`).
    """
    tensors = {"query": query, "key": key, "mask": mask}
    checks.check_tensors(**tensors)
    if scale is not None:
        checks.check_number("scale", scale)
    if softcap is not None:
        checks.check_number("softcap", softcap)
        if not softcap >= torch.finfo(torch.float32).tiny:
            raise ValueError(f"softcap: expected a positive float32, got {softcap!r}")
    if torch.is_grad_enabled():
        if backend.is_reference():
            return _run(query, key, mask, scale, softcap)
        checks.refuse_gradients(**tensors)
    return _op(query, key, mask, scale, softcap)


def gather_tokens(tensors: Sequence[torch.Tensor], columns: torch.Tensor) -> list[torch.Tensor]:
    """The same tokens of several tensors, in one pass: tensors [B, T, ...] or [1, T, ...], for all rows the same, and
    columns int64 [B, n] -> [B, n, ...] each, y[b, i] = x[b, columns[b, i]], contiguous.

    For hidden states, rotary tables, positions: of any dtypes, not complex, and one T. Columns are from 0 to T - 1, in
    any order, and may repeat. Tensors whose rows x[b, t] are not contiguous are copied first: of positions [3, B, T]
    give movedim(0, -1).

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: shapes or devices that do not fit, no tensors; on a CPU, columns outside of 0 to T - 1. (On a GPU
            such a column gives zeros: looking for it would wait for the device.)
        NotImplementedError: an input that requires grad (see `hasten.kernels.checks`).
    """
    tensors = list(tensors)
    named = {f"tensors[{i}]": x for i, x in enumerate(tensors)}
    checks.check_tensors(**named, columns=columns)
    if torch.is_grad_enabled():
        if backend.is_reference():
            return _run_gather(tensors, columns)
        checks.refuse_gradients(**named)
    return _gather_op(tensors, columns)


def _check(query, key, mask):
    if query.dim() != 4 or 0 in query.shape[1:]:
        expected = "[B, Q, H, D] with Q, H and D of at least 1"
        raise ValueError(f"query: expected shape {expected}, got shape {list(query.shape)}")
    checks.check_floating("query", query)
    B, Q, H, D = query.shape
    if key.dim() != 4 or key.shape[0] != B or key.shape[3] != D:
        raise ValueError(f"key: expected shape [{B}, G, T, {D}], got shape {list(key.shape)}")
    G, T = key.shape[1:3]
    if G == 0 or H % G:
        raise ValueError(f"key: expected a number of heads that divides the {H} of query, got {G} heads")
    checks.check_like(query, "key", key, "query")
    if D > 1 and key.stride(3) != 1:
        raise ValueError(f"key: expected a last dimension of stride 1, got strides {key.stride()}")
    if mask is not None:
        checks.check_shape("mask", mask, [B, T], [B, Q, T])
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: expected torch.bool, got {mask.dtype}")
        checks.check_device(query, "mask", mask, "query")


def _run(query, key, mask, scale, softcap):
    _check(query, key, mask)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    name = backend.choose(query)
    rows = query.shape[1] * query.shape[2] // key.shape[1]
    if name == "reference" or (name == "cpu" and rows > MOST_ROWS) or not query.numel() or not key.numel():
        return reference.token_scores(query, key, mask, scale, softcap)
    query = query.contiguous()
    mask = mask if mask is None or mask.dim() == 3 else mask[:, None]
    mask = None if mask is None else mask.contiguous()
    if name == "triton":
        from . import triton

        return triton.token_scores(query, key, mask, scale, softcap)
    return cpu.launch(query, key, mask, scale, softcap)


def _fake(query, key, mask, scale, softcap):
    _check(query, key, mask)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(key.shape[0], key.shape[2], dtype=dtype)


def _check_gather(tensors, columns):
    if not tensors:
        raise ValueError("tensors: expected at least one tensor, got none")
    first = tensors[0]
    if columns.dim() != 2:
        raise ValueError(f"columns: expected shape [B, n], got shape {list(columns.shape)}")
    if columns.dtype != torch.int64:
        raise TypeError(f"columns: expected torch.int64, got {columns.dtype}")
    checks.check_device(first, "columns", columns, "tensors[0]")
    B = columns.shape[0]
    for i, x in enumerate(tensors):
        if x.dim() < 2 or x.shape[0] not in (1, B) or x.shape[1] != first.shape[1]:
            T = first.shape[1] if first.dim() > 1 else "T"
            expected = f"[{B}, {T}, ...] or [1, {T}, ...]"
            raise ValueError(f"tensors[{i}]: expected shape {expected}, got shape {list(x.shape)}")
        if x.is_complex():
            raise TypeError(f"tensors[{i}]: expected a dtype that is not complex, got {x.dtype}")
        checks.check_device(first, f"tensors[{i}]", x, "tensors[0]")


def _run_gather(tensors, columns):
    _check_gather(tensors, columns)
    T = tensors[0].shape[1]
    if columns.is_cpu and columns.numel():
        low, high = (int(column) for column in columns.aminmax())
        if low < 0 or high >= T:
            raise ValueError(f"columns: expected values from 0 to {T - 1}, got {low if low < 0 else high}")
    if backend.choose_by_device(columns) != "triton" or not T:
        return reference.gather_tokens(tensors, columns)
    from . import triton

    return triton.gather_tokens([_with_contiguous_rows(x) for x in tensors], columns.contiguous())


def _with_contiguous_rows(x):
    return x if x[:1, :1].is_contiguous() else x.contiguous()


def _fake_gather(tensors, columns):
    _check_gather(tensors, columns)
    return [x.new_empty(*columns.shape, *x.shape[2:]) for x in tensors]


_library.impl("token_scores", _run, "CompositeExplicitAutograd")
_library.impl("gather_tokens", _run_gather, "CompositeExplicitAutograd")
torch.library.register_fake("hasten::token_scores", _fake, lib=_library)
torch.library.register_fake("hasten::gather_tokens", _fake_gather, lib=_library)
_op = torch.ops.hasten.token_scores.default
_gather_op = torch.ops.hasten.gather_tokens.default
