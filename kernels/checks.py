"""What operators check before a kernel runs, with one error for one kind of mistake.

TypeError: an argument of another kind, or a tensor of another dtype. ValueError: a shape, a value, a device or a layout
in memory. NotImplementedError: an input that requires grad in grad mode. Kernels have no gradients, whatever the shapes
and wherever they run; the definitions have, under `hasten.kernels.backend.use("reference")`,
all but those of steps, which change a state in place.
"""

import math

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
OPTIONAL = ("bias", "cutoff", "decay", "initial_state", "cu_seqlens", "mask", "D", "z", "dt_bias")  # None for none
DIFFERENTIABLE = 'call it under torch.no_grad(), or under hasten.kernels.backend.use("reference"), which has gradients'
IN_PLACE = "call it under torch.no_grad(); the operator for whole sequences has gradients as reference"


def check_tensors(**tensors: Tensor | None) -> None:
    """Raises TypeError for what is no tensor."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and not (tensor is None and name in OPTIONAL):
            raise TypeError(f"{name}: expected a tensor, got {tensor!r}")


def refuse_gradients(advice: str = DIFFERENTIABLE, /, **tensors: Tensor | None) -> None:
    """Raises NotImplementedError where autograd would want a gradient of a kernel."""
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                raise NotImplementedError(f"{name} requires grad, and the kernel has no gradients: {advice}")


def check_number(name: str, value: float) -> None:
    """Raises TypeError for what is no number, ValueError for one that is not finite."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")


def check_floating(name: str, tensor: Tensor) -> None:
    """Raises TypeError unless the kernels or the definition compute in the tensor's dtype."""
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a floating dtype of at least 16 bits, got {tensor.dtype}")


def check_shape(name: str, tensor: Tensor, *shapes: list[int]) -> None:
    """Raises ValueError unless tensor has one of the shapes."""
    if list(tensor.shape) not in shapes:
        raise ValueError(f"{name}: expected shape {' or '.join(map(str, shapes))}, got shape {list(tensor.shape)}")


def check_device(x: Tensor, name: str, tensor: Tensor, of: str = "x") -> None:
    """Raises ValueError unless tensor is on the device of x, which is called `of`."""
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected on {x.device}, the device of {of}, got {tensor.device}")


def check_like(x: Tensor, name: str, tensor: Tensor, of: str = "x") -> None:
    """Raises TypeError unless tensor has the dtype of x, which is called `of`,
    ValueError unless it is on its device."""
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name}: expected {x.dtype}, the dtype of {of}, got {tensor.dtype}")
    if tensor.device != x.device:
        check_device(x, name, tensor, of)


def check_float32(x: Tensor, name: str, tensor: Tensor) -> None:
    """Raises TypeError unless tensor is float32, ValueError unless it is on the device of x:
    what says which columns or rows are active."""
    if tensor.dtype != torch.float32:
        raise TypeError(f"{name}: expected torch.float32, got {tensor.dtype}")
    if tensor.device != x.device:
        check_device(x, name, tensor)


def check_writable(name: str, tensor: Tensor) -> None:
    """Raises ValueError where elements of a tensor that is to be updated share memory."""
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError(
            f"{name}: expected memory of its own for every element, got strides {tensor.stride()}: clone it"
        )
