"""Triton's interpreter with the products of matrix units, which it has in NumPy's own way: tf32 in full float32, bfloat16
wrongly, and it cuts float32 off where a GPU rounds it to bfloat16."""

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def install(monkeypatch) -> None:
    """What tensor cores of NVIDIA do: they ignore the last 13 bits of an operand in tf32; three products make tf32x3."""
    monkeypatch.setattr(InterpreterBuilder, "create_dot", _dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", _rounding(InterpreterBuilder.cast_impl))
    monkeypatch.setattr(InterpreterBuilder, "create_fp_to_fp", _rounding(InterpreterBuilder.create_fp_to_fp))


def _rounding(convert):
    """`convert`, but float32 to the nearest bfloat16."""

    def converted(self, x, dtype, *mode):
        if (x.dtype.scalar.name, dtype.scalar.name) != ("fp32", "bf16"):
            return convert(self, x, dtype, *mode)
        halves = torch.from_numpy(np.ascontiguousarray(x.data)).bfloat16()
        return TensorHandle(halves.view(torch.uint16).numpy(), dtype.scalar)

    return converted


def _dot(self, x, y, total, precision, *rest):
    x, y, precise = _full(x), _full(y), precision.name
    if precise == "TF32":
        x, y = _cut(x), _cut(y)
    elif precise == "TF32x3":
        (x, x_rest), (y, y_rest) = ((_cut(z), _cut(z - _cut(z))) for z in (x, y))
        return TensorHandle(x_rest @ y + x @ y_rest + x @ y + total.data, total.dtype.scalar)
    return TensorHandle(x @ y + total.data, total.dtype.scalar)


def _full(x) -> np.ndarray:
    """In float32."""
    if x.dtype.scalar.name == "bf16":
        return (x.data.astype(np.uint32) << 16).view(np.float32)
    return x.data.astype(np.float32)


def _cut(x: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
