"""Suffix arrays of texts in memory.

SA-IS, linear in the text's length: Nong, Zhang and Chan 2009, "Linear Suffix Array Construction by Almost Pure Induced-Sorting".
"""

import torch

from .. import backend
from . import cpu, reference

LONGEST = 2**31 - 1


def suffix_array(text: torch.Tensor) -> torch.Tensor:
    """text [N] uint8 on the CPU, contiguous, N < 2**31 -> [N] int32: where the suffixes begin, in ascending order.

    A suffix that is the beginning of another one comes before it. Needs 4.2 N bytes beside the text as compiled code with one thread; without a
    compiler the definition in torch takes its place, with 50 N bytes and more time.

    Raises:
        ValueError: another dtype, shape, device or length.
    """
    if text.dtype != torch.uint8 or text.dim() != 1 or not text.is_cpu or not text.is_contiguous():
        raise ValueError(
            f"text: expected a contiguous uint8 tensor [N] on the CPU, got {text.dtype} {list(text.shape)} on {text.device}"
        )
    if text.numel() > LONGEST:
        raise ValueError(f"text: expected at most {LONGEST} bytes, got {text.numel()}")
    if backend.is_reference() or backend.available()["cpu"]:
        return reference.suffix_array(text)
    return cpu.launch(text)
