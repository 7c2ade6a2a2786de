"""Scores of tokens by the attention of the last query, or of a text's, and gathering of the tokens that are kept:
against the same in torch."""

from functools import partial

import torch

from hasten.kernels.token_scores import gather_tokens, token_scores

from ..runner import OURS, Case, copies

HEADS = [(16, 16, 64), (32, 32, 128), (28, 4, 128), (32, 4, 64)]  # H, G, D
LENGTHS = [600, 3000]
QUERIES = 32
HIDDEN = 4096
DTYPES = [torch.bfloat16, torch.float32]


def cases(device: str) -> list[Case]:
    found = [_scores(1, *heads, T, dtype, device) for dtype in DTYPES for heads in HEADS for T in LENGTHS]
    found += [_scores(QUERIES, 32, G, 128, LENGTHS[0], dtype, device) for dtype in DTYPES for G in (32, 4)]
    if device == "cuda":  # on a CPU it is torch's
        found += [_gather(T, keep, torch.bfloat16, device) for T in LENGTHS for keep in (25, 50)]
    return found


def _scores(Q: int, H: int, G: int, D: int, T: int, dtype: torch.dtype, device: str) -> Case:
    def make():
        query = torch.randn(1, Q, H, D, dtype=dtype, device=device)
        keys = copies(torch.randn(1, G, T, D, dtype=dtype, device=device))
        return {
            OURS: [partial(token_scores, query, key) for key in keys],
            "torch": [partial(_torch_scores, query, key) for key in keys],
        }

    queries = "1 query" if Q == 1 else f"{Q} queries"
    name = f"{queries}, {H} heads on {G} of {D}, {T} keys"
    moved = G * T * D * dtype.itemsize + T * 4
    return Case("token_scores", name, dtype, device, moved, make, 2 * Q * H * D * T if Q > 1 else 0)


def _torch_scores(query, key):
    """As one writes it in torch: a product for each group of heads, which rounds logits to the dtype of the keys."""
    (B, Q, H, D), G = query.shape, key.shape[1]
    grouped = query.view(B, Q, G, H // G, D).permute(0, 2, 1, 3, 4).reshape(B, G, -1, D)
    logits = grouped @ key.mT * D**-0.5
    return logits.softmax(-1, dtype=torch.float32).mean((1, 2))


def _gather(T: int, keep: int, dtype: torch.dtype, device: str) -> Case:
    n = T * keep // 100

    def make():
        columns = torch.randperm(T, device=device)[:n].sort().values[None]
        hidden = copies(torch.randn(1, T, HIDDEN, dtype=dtype, device=device))
        others = [torch.randn(1, T, 128, dtype=dtype, device=device) for _ in range(2)]
        others.append(torch.arange(T, device=device)[None])
        return {
            OURS: [partial(gather_tokens, [h, *others], columns) for h in hidden],
            "torch": [partial(_torch_gather, [h, *others], columns[0]) for h in hidden],
        }

    moved = 2 * n * ((HIDDEN + 2 * 128) * dtype.itemsize + 8)
    return Case("gather_tokens", f"{n} of {T} tokens of {HIDDEN}", dtype, device, moved, make)


def _torch_gather(tensors, columns):
    return [x.index_select(1, columns) for x in tensors]
