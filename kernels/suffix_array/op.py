"""Suffix arrays of texts in memory.

SA-IS, linear in the text's length: Nong, Zhang and Chan 2009, "Linear Suffix Array Construction by
Almost Pure Induced-Sorting".
"""

import torch

from .. import backend, checks
from . import cpu, reference

LONGEST = 2**31 - 1


def suffix_array(text: torch.Tensor) -> torch.Tensor:
    """text [N] uint8 on the CPU, contiguous, N < 2**31 -> [N] int32: where the suffixes begin, in ascending order.

    A suffix that is the beginning of another one comes before it. Needs 4.2 N bytes beside the text as compiled code
    with one thread; without a compiler the definition in torch takes its place, with 50 N bytes and more time.

    Raises:
        TypeError: no tensor, or another dtype.
        ValueError: another shape, device, layout or length.
    """
    checks.check_tensors(text=text)
    if text.dtype != torch.uint8:
        raise TypeError(f"text: expected torch.uint8, got {text.dtype}")
    if text.dim() != 1 or not text.is_cpu or not text.is_contiguous():
        found = f"shape {list(text.shape)} and strides {text.stride()} on {text.device}"
        raise ValueError(f"text: expected shape [N], contiguous, on the CPU, got {found}")
    if text.numel() > LONGEST:
        raise ValueError(f"text: expected at most {LONGEST} bytes, got {text.numel()}")
    if backend.is_reference() or backend.available()["cpu"]:
        return reference.suffix_array(text)
    return cpu.launch(text)
