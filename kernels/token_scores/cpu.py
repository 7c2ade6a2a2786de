"""The compiled token_scores and gather_tokens: their C signatures and launchers."""

import ctypes

import torch

from .. import cpu, storage


class TokenScoresArguments(cpu.Arguments):
    __slots__ = ()
    _fields_ = (
        ("dtype", cpu.FLAG),
        ("threads", cpu.FLAG),
        ("mask_per_query", cpu.FLAG),
        ("scale", cpu.REAL),
        ("scores", cpu.POINTER),
        ("query", cpu.POINTER),
        ("key", cpu.POINTER),
        ("mask", cpu.POINTER),
        ("B", cpu.SIZE),
        ("Q", cpu.SIZE),
        ("H", cpu.SIZE),
        ("D", cpu.SIZE),
        ("G", cpu.SIZE),
        ("T", cpu.SIZE),
        ("row_stride", cpu.SIZE),
        ("group_stride", cpu.SIZE),
        ("key_stride", cpu.SIZE),
    )


class GatheredTensor(cpu.Arguments):
    __slots__ = ()
    _fields_ = (
        ("y", cpu.POINTER),
        ("x", cpu.POINTER),
        ("bytes", cpu.SIZE),
        ("row_stride", cpu.SIZE),
        ("token_stride", cpu.SIZE),
    )


class GatherTokensArguments(cpu.Arguments):
    __slots__ = ()
    _fields_ = (
        ("tensors", cpu.POINTER),
        ("columns", cpu.POINTER),
        ("count", cpu.SIZE),
        ("B", cpu.SIZE),
        ("n", cpu.SIZE),
        ("bytes", cpu.SIZE),
        ("threads", cpu.SIZE),
    )


_token_scores = cpu.Function("token_scores", TokenScoresArguments)
_gather_tokens = cpu.Function("gather_tokens", GatherTokensArguments)


def token_scores(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """query [B, Q, H, D], contiguous, key [B, G, T, D] with a last stride of 1, mask bool [B, 1 or Q, T], contiguous,
    or None -> float32 [B, T]; no size is 0."""
    (B, Q, H, D), (G, T) = query.shape, key.shape[1:3]
    scores = torch.empty(B, T)
    _token_scores(
        TokenScoresArguments(
            dtype=storage.DTYPE_CODES[query.dtype],
            threads=torch.get_num_threads(),
            mask_per_query=mask is not None and mask.shape[1] == Q,
            scale=scale,
            scores=scores.data_ptr(),
            query=query.data_ptr(),
            key=key.data_ptr(),
            mask=cpu.address(mask),
            B=B,
            Q=Q,
            H=H,
            D=D,
            G=G,
            T=T,
            row_stride=key.stride(0),
            group_stride=key.stride(1),
            key_stride=key.stride(2),
        )
    )
    return scores


def gather_tokens(tensors: list[torch.Tensor], columns: torch.Tensor) -> list[torch.Tensor]:
    """tensors [B or 1, T, ...] whose rows are contiguous, columns [B, n] within T, contiguous -> [B, n, ...] each."""
    B, n = columns.shape
    gathered = [x.new_empty(B, n, *x.shape[2:]) for x in tensors]
    pairs = []
    for y, x in zip(gathered, tensors, strict=True):
        size = x.element_size()
        pairs.append(
            GatheredTensor(
                y=y.data_ptr(),
                x=x.data_ptr(),
                bytes=x.shape[2:].numel() * size,
                row_stride=x.stride(0) * size if len(x) > 1 else 0,
                token_stride=x.stride(1) * size,
            )
        )
    table = (GatheredTensor * len(pairs))(*pairs)
    _gather_tokens(
        GatherTokensArguments(
            tensors=ctypes.addressof(table),
            columns=columns.data_ptr(),
            count=len(pairs),
            B=B,
            n=n,
            bytes=sum(y.nbytes for y in gathered),
            threads=torch.get_num_threads(),
        )
    )
    return gathered
