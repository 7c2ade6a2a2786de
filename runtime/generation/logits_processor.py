"""Constraints inside transformers' own `generate`, as masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from hasten.generation.tokenizer import vocabulary_of
from hasten.guidance.text import bitmask
from hasten.guidance.text.constraints import Constraint


class ConstraintLogitsProcessor(transformers.LogitsProcessor):
    """Masks what a constraint refuses, for `model.generate(..., logits_processor=[ConstraintLogitsProcessor(...)])`.

    Batches, sampling and beam search work; rows are known by their tokens. A call on what the call before gave goes on
    with the same texts; for any other input all of it is the prompt. The law is that of local masking;
    `hasten.generate` with particles corrects it, and gives a typed error where transformers can only stop at its limit
    of tokens.

    Args:
        constraint: what the text after the prompt must satisfy. One that cannot fill masks (a Predicate) is asked about
            every token of the vocabulary.
        tokenizer, model: as for `hasten.generate`.

    Raises (from the constructor):
        ValueError: as `hasten.generate`, for the constraint and the tokenizer.
    """

    def __init__(self, constraint: Constraint, tokenizer, model: nn.Module):
        self._bound = constraint.bind(vocabulary_of(tokenizer, model))
        self._states: dict[tuple[int, ...], Any] = {}  # None: the text has ended

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores [B, V] with -inf where the constraint refuses, given the tokens so far [B, T].

        Raises:
            ValueError: the constraint allows nothing more, not even the end.
        """
        rows = [tuple(row) for row in input_ids.tolist()]
        if not all(row[:-1] in self._states for row in rows):  # a new call: all of this is the prompt
            states = {row: self._bound.start() for row in rows}
        else:
            states = {row: self._advance(self._states[row[:-1]], row[-1]) for row in dict.fromkeys(rows)}
        self._states = states
        size = len(self._bound.vocabulary)
        mask = bitmask.allocate(size, rows=len(rows))
        for row, bits in zip(rows, mask, strict=True):
            self._fill(states[row], bits)
        return bitmask.apply(scores, mask, size)

    def _advance(self, state: Any, token: int) -> Any:
        if state is None or token in self._bound.vocabulary.eos or not self._bound.check(state, token):
            return None  # transformers pads rows that have ended, and beams that it has given up
        return self._bound.advance(self._bound.fork(state), token)

    def _fill(self, state: Any, bits: np.ndarray) -> None:
        if state is None:
            bits[:] = -1
            return
        self._bound.fill_mask_or_check(state, bits)
        if not bits.any():
            raise ValueError(f"dead end: the constraint allows {self._bound.allowed_text(state)}, and not the end")
