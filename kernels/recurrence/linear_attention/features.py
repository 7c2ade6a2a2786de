"""What linear-attention methods do to q and k before the recurrence, and the decays that they give it.

relu (cosFormer, SUPRA, L2ViT) and silu (TransNormerLLM, MiniMax-01) are torch's own.

Letters as in `linear_attention`: x [B, T, H, D] of any floating dtype, differentiable.
Every decay is a logarithm, ready for `decay=`.
"""

import math

import torch
from torch.nn import functional


def elu_plus_one(x: torch.Tensor) -> torch.Tensor:
    """elu(x) + 1, above 0: [..., D] -> [..., D] (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 7)."""
    return functional.elu(x) + 1


def silu_shifted(x: torch.Tensor) -> torch.Tensor:
    """(silu(x) + 0.5) over its norm: [..., D] -> [..., D] of length 1 and above 0 (LION, Afzal et al.
    2025, arXiv 2502.16249)."""
    shifted = functional.silu(x) + 0.5  # silu is at least -0.279, so the norm is not 0
    return shifted / shifted.norm(dim=-1, keepdim=True)


def dpfp(x: torch.Tensor, nu: int) -> torch.Tensor:
    """Deterministic parameter-free projection: [..., D] -> [..., 2 D nu] (Schlag et al. 2021, arXiv 2102.11174, DPFP).

    With r = [relu(x), relu(-x)], the products r * roll(r, i) for i = 1 to nu, side by side. `sum_normalize` follows it.
    """
    if nu < 1:
        raise ValueError(f"nu: expected at least 1, got {nu}")
    r = torch.cat([functional.relu(x), functional.relu(-x)], -1)
    return torch.cat([r * r.roll(i, -1) for i in range(1, nu + 1)], -1)


def sum_normalize(features: torch.Tensor) -> torch.Tensor:
    """features / their sum: [..., D] >= 0 -> [..., D] that sums to 1 (Schlag et al. 2021, arXiv
    2102.11174, sum normalisation).

    Exact, without an epsilon; where every feature is 0 (the source has NaN there) the result is 0,
    a key that writes nothing.
    """
    total = features.sum(-1, keepdim=True)
    return features / torch.where(total == 0, 1, total).to(features.dtype)


def cosformer(x: torch.Tensor, positions: torch.Tensor, longest: float) -> torch.Tensor:
    """[x sin(pi i / 2M), x cos(pi i / 2M)]: [B, T, H, D] -> [B, T, H, 2 D] (cosFormer, arXiv 2202.08791), x after relu.

    positions [T] or [B, T] are i, from 1 on; longest is M, the longest sequence.
    A state holds only for the M that it was computed with.
    """
    if longest <= 0:
        raise ValueError(f"longest: expected above 0, got {longest}")
    angle = (math.pi / (2 * longest)) * _positions(x, positions)[..., None, None]
    return _rotated(x, angle.sin(), angle.cos())


def lrpe(x: torch.Tensor, theta: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[x cos(theta i), x sin(theta i)]: [B, T, H, D] -> [B, T, H, 2 D] (TransNormerLLM, arXiv 2405.17381, eq. 9).

    theta is [H, D], positions [T] or [B, T]. Products of q and k then depend on the difference of their
    positions alone.
    """
    if list(theta.shape) != list(x.shape[2:]):
        raise ValueError(f"theta: expected shape {list(x.shape[2:])}, got shape {list(theta.shape)}")
    angle = _positions(x, positions)[..., None, None] * theta.to(_wide(x))
    return _rotated(x, angle.cos(), angle.sin())


def lrpe_theta(heads: int, dim: int) -> torch.Tensor:
    """The initial theta [H, D] of `lrpe`: 10000^(-2 j / (H D)) for the j-th of all H D components
    (TransNormerLLM, arXiv 2307.14995)."""
    _check_count("heads", heads)
    _check_count("dim", dim)
    j = torch.arange(heads * dim, dtype=torch.float64)
    return (10000 ** (-2 * j / (heads * dim))).view(heads, dim).float()


def hgrn2_gates(f: torch.Tensor, lower_bound: float | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(decay, k) of f [B, T, H, K], both of its shape (HGRN2, Qin et al. 2024, arXiv 2404.07904).

    decay = log(lb + (1 - lb) sigmoid(f)) and k = 1 - exp(decay) = (1 - lb) sigmoid(-f). lower_bound, a number or a
    tensor that broadcasts with f, is in [0, 1]; 0 is none. decay is float32 or wider, k has f's dtype. No step cancels,
    so that a small k and a decay close to 0 are exact too.
    """
    bound, wide = torch.as_tensor(lower_bound, dtype=_wide(f)), f.to(_wide(f))
    if bound.is_cpu and not bool(((bound >= 0) & (bound <= 1)).all()):  # on a GPU looking would wait for it
        raise ValueError(f"lower_bound: expected from 0 to 1, got {lower_bound}")
    bound = bound.to(f.device, wide.dtype)
    k = (1 - bound) * torch.sigmoid(-wide)
    open_gate = torch.log1p(-bound) + functional.logsigmoid(wide)
    nearly_open = torch.log1p(-k.clamp(max=0.5))
    decay = torch.where(k < 0.5, nearly_open, torch.logaddexp(bound.log(), open_gate))
    return decay, k.to(f.dtype)


def bounded_linear_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tau: torch.Tensor | float, bound: float = 100.0
) -> torch.Tensor:
    """o = tau_h q (K^T V) / max(q . sum k, bound), every token with all others: q, k [B, T, H, K], v
    [B, T, H, V] -> [B, T, H, V].

    L2ViT (Zheng 2025, arXiv 2501.16182): q and k after relu, tau [H] learned per head, K^-1/2 at first. The
    bound keeps a small normaliser from blowing the output up. Sums are in float32 or wider.
    """
    if q.dim() != 4 or k.shape != q.shape or v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        expected = "q, k [B, T, H, K] and v [B, T, H, V]"
        raise ValueError(
            f"q, k, v: expected {expected}, got shapes {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    tau = torch.as_tensor(tau, dtype=_wide(q), device=q.device)
    if list(tau.shape) not in ([], [q.shape[2]]):
        raise ValueError(f"tau: expected a number or shape [{q.shape[2]}], got shape {list(tau.shape)}")
    if bound <= 0:
        raise ValueError(f"bound: expected above 0, got {bound}")
    wide_q, wide_k, wide_v = (x.to(_wide(q)) for x in (q, k, v))
    S = torch.einsum("bthk,bthv->bhkv", wide_k, wide_v)
    normaliser = torch.einsum("bthk,bhk->bth", wide_q, wide_k.sum(1)).clamp(min=bound)
    o = torch.einsum("bthk,bhkv->bthv", wide_q, S)
    return (tau[..., None] * o / normaliser[..., None]).to(v.dtype)


def alibi_slopes(heads: int) -> torch.Tensor:
    """Slopes [H] of ALiBi, 2^(-8 (h + 1) / H) (Press et al. 2022, arXiv 2108.12409),
    interpolated where H is no power of two.

    Then the largest power of two P below H gives P slopes, and every second one of 2 P the rest,
    as TransNormerLLM's code has it.
    """
    _check_count("heads", heads)
    power = 1 << (heads.bit_length() - 1)
    return torch.cat([plain_slopes(power), plain_slopes(2 * power)[::2][: heads - power]])


def plain_slopes(heads: int) -> torch.Tensor:
    """Slopes [H] 2^(-8 (h + 1) / H) for every H: what MiniMax-01 (arXiv 2501.08313) has in transformers."""
    _check_count("heads", heads)
    return (2 ** (-8 * torch.arange(1, heads + 1, dtype=torch.float64) / heads)).float()


def lightning_decay(heads: int, layer: int, layers: int) -> torch.Tensor:
    """Log decays [H] of lightning attention, -s_h (1 - layer / (layers - 1) + 1e-5) with `alibi_slopes` s_h,
    as TransNormerLLM was released.

    The paper (arXiv 2405.17381, eq. 10) has another formula, which no released model follows. MiniMax has the same
    factor times `plain_slopes`. layer counts from 0. The decay of the last layer is almost none;
    the only layer of a model of one is its first.
    """
    if not 0 <= layer < layers:
        raise ValueError(f"layer: expected from 0 to {layers - 1}, for {layers} layers, got {layer}")
    return -alibi_slopes(heads) * (1 - layer / max(layers - 1, 1) + 1e-5)


def retnet_decay(heads: int) -> torch.Tensor:
    """Log decays [H] of RetNet, log(1 - 2^(-5 - h)) (Sun et al. 2023, arXiv 2307.08621)."""
    _check_count("heads", heads)
    return torch.log1p(-(2.0 ** (-5 - torch.arange(heads, dtype=torch.float64)))).float()


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _positions(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """positions as [T] or [B, T] of the dtype that angles of x are computed in."""
    if x.dim() != 4:
        raise ValueError(f"x: expected shape [B, T, H, D], got shape {list(x.shape)}")
    B, T = x.shape[:2]
    if list(positions.shape) not in ([T], [B, T], [1, T]):
        raise ValueError(f"positions: expected shape [{T}] or [{B}, {T}], got shape {list(positions.shape)}")
    return positions.to(x.device, _wide(x))


def _rotated(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return torch.cat([x * first, x * second], -1).to(x.dtype)


def _check_count(name: str, count: int) -> None:
    if count < 1:
        raise ValueError(f"{name}: expected at least 1, got {count}")
