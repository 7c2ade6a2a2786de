"""Token sequences for calibration and for measuring drift, from texts or from token ids."""

from collections.abc import Sequence

import torch

Texts = str | Sequence[str] | torch.Tensor | Sequence[torch.Tensor]

WINDOW = 512
SHORTEST = 8


def windows(
    data: Texts, tokenizer, vocabulary: int, name: str = "calibration", longest: int = WINDOW
) -> list[torch.Tensor]:
    """Cuts texts, one after the other, or rows of token ids into windows of at most WINDOW tokens. Tails shorter than SHORTEST are left out.

    Args:
        data: texts (with a tokenizer), a tensor of token ids [T] or [B, T], or a sequence of such tensors.
        vocabulary: the number of rows of the model's embedding.
        name: what to call `data` in errors.
        longest: the longest input of the model, if that is less than WINDOW.

    Returns:
        int64 tensors [T] on the CPU.

    Raises:
        TypeError, ValueError: no data, texts without a tokenizer, ids that are no integers or outside the vocabulary.
    """
    items = _items(data, name)
    sequences = [sequence for item in items for sequence in _ids(item, tokenizer, name)]
    if sequences and all(isinstance(item, str) for item in items):
        sequences = [torch.cat(sequences)]  # however short each text is, nothing of it is lost
    pieces = [piece for sequence in sequences for piece in sequence.split(min(WINDOW, longest))]
    pieces = [piece for piece in pieces if piece.numel() >= SHORTEST]
    if not pieces:
        longest = max((sequence.numel() for sequence in sequences), default=0)
        raise ValueError(f"{name} is empty: the longest sequence has {longest} tokens, at least {SHORTEST} are needed")
    for piece in pieces:
        if piece.min() < 0 or piece.max() >= vocabulary:
            raise ValueError(
                f"{name} holds token id {int(piece.max() if piece.min() >= 0 else piece.min())}, the vocabulary is 0..{vocabulary - 1}"
            )
    return pieces


def split_heldout(pieces: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Sets about a tenth of the windows aside for measuring drift; a single window is cut after three quarters."""
    if len(pieces) > 1:
        kept = len(pieces) - max(1, len(pieces) // 10)
        return pieces[:kept], pieces[kept:]
    cut = pieces[0].numel() * 3 // 4
    heldout = pieces[0][cut:]
    return ([pieces[0][:cut]], [heldout]) if heldout.numel() >= SHORTEST else (pieces, [])


def _items(data: Texts, name: str) -> list:
    if isinstance(data, str):
        return [data]
    if isinstance(data, torch.Tensor):
        return list(data) if data.dim() == 2 else [data]
    if not isinstance(data, Sequence):
        raise TypeError(f"{name} must be texts or tensors of token ids, got {type(data).__name__}")
    if not data:
        raise ValueError(f"{name} is empty: give a few thousand tokens of typical text")
    return [row for item in data for row in (_items(item, name) if isinstance(item, torch.Tensor) else [item])]


def _ids(item, tokenizer, name: str) -> list[torch.Tensor]:
    if isinstance(item, str):
        if tokenizer is None:
            raise ValueError(f"{name} holds texts: pass tokenizer= as well, or token-id tensors")
        return [torch.tensor(tokenizer(item, verbose=False)["input_ids"], dtype=torch.int64)]
    if not isinstance(item, torch.Tensor):
        raise TypeError(f"{name} must hold texts or tensors of token ids, got {type(item).__name__}")
    if item.dim() != 1 or item.dtype.is_floating_point or item.dtype == torch.bool:
        raise ValueError(f"{name} must hold integer tensors [T] or [B, T], got {item.dtype} {list(item.shape)}")
    return [item.long().cpu()]
