"""The compiled token_scores: its C signature and its launcher."""

import torch

from .. import cpu, storage


class TokenScoresArguments(cpu.Arguments):
    __slots__ = ()
    _fields_ = (
        ("dtype", cpu.FLAG),
        ("threads", cpu.FLAG),
        ("scale", cpu.REAL),
        ("softcap", cpu.REAL),
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
        ("mask_per_query", cpu.SIZE),
    )


_token_scores = cpu.Function("token_scores", TokenScoresArguments)


def launch(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float, softcap: float | None
) -> torch.Tensor:
    """query [B, Q, H, D], contiguous, key [B, G, T, D] with a last stride of 1, mask bool [B, 1 or Q, T], contiguous,
    or None -> float32 [B, T]; no size is 0."""
    (B, Q, H, D), (G, T) = query.shape, key.shape[1:3]
    scores = torch.empty(B, T, dtype=torch.float32, device="cpu")
    _token_scores(
        TokenScoresArguments(
            dtype=storage.DTYPE_CODES[query.dtype],
            threads=torch.get_num_threads(),
            mask_per_query=mask is not None and mask.shape[1] == Q,
            scale=scale,
            softcap=softcap or 0.0,
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
