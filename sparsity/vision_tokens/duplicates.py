"""Identical rows: an image tower that is run once for each distinct tile or image computes the same as for all of them.
Pages and screenshots hold many tiles of one colour."""

import torch


def identical_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows of x are distinct, by the bits of their elements: 0.0 and -0.0 differ, a NaN is like its copy.

    Args:
        x: [N, ...], of any dtype, on any device.

    Returns:
        unique, int64 [U]: the first row of each kind, rising. inverse, int64 [N]: x[unique][inverse] is x.

    Raises:
        ValueError: x has no dimension.
    """
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, of rows, got a scalar")
    words = _words(x)
    return _grouped(words, _hashes(words))


def _words(x: torch.Tensor) -> torch.Tensor:
    """The bits of x [N, ...] as int64 [N, W], with zeros at the end of each row."""
    if not x.numel():
        return torch.zeros(len(x), 0, dtype=torch.int64, device=x.device)
    octets = x.detach().contiguous().flatten().view(torch.uint8).reshape(len(x), -1)
    return torch.nn.functional.pad(octets, (0, -octets.shape[1] % 8)).view(torch.int64)


def _hashes(words: torch.Tensor) -> torch.Tensor:
    """One int64 per row of words [N, W]: a product with random odd numbers, modulo 2^64."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**63), 2**63 - 1, (words.shape[1],), generator=generator, dtype=torch.int64) | 1
    return (words * factors.to(words.device)).sum(1)


def _grouped(words: torch.Tensor, hashes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`identical_rows` of words [N, W]. Rows of one hash [N] are compared, so that a collision is no error."""
    N, device = len(words), words.device
    rows = torch.arange(N, device=device)
    _, group = torch.unique(hashes, return_inverse=True)
    first = torch.full((N,), N, device=device).scatter_reduce(0, group, rows, "amin")[group]
    first = torch.minimum(first, rows)
    others = rows[first != rows]
    left = others[(words[others] != words[first[others]]).any(1)]
    while left.numel():
        alike = left[(words[left] == words[left[0]]).all(1)]
        first[alike] = left[0]
        left = left[first[left] != left[0]]
    return torch.unique(first, return_inverse=True)
