"""What the techniques share that skip work in decode alone."""

from collections.abc import Callable
from typing import ClassVar

from torch import nn

from hasten.acceleration.edits import Edit, RefuseMethod
from hasten.acceleration.techniques.base import Technique
from hasten.acceleration.techniques.dense_decode import DenseDecode
from hasten.errors import UnsupportedModelError

NOT_LOSSLESS = (
    "in assisted decoding drafts would be verified by the dense model and decoded by the sparse one: other text than "
    "without"
)
NO_PAGES = "continuous batching packs the rows of a batch into one, which hasten's kernels do not tell from a prefill"


class SparseDecode(Technique):
    """A technique whose settings hold a "sparsity" for every part that skips something. What is left dense is decoded
    as `DenseDecode` does."""

    __slots__ = ()
    calibrated: ClassVar[bool] = True

    @property
    def implies(self):
        return (DenseDecode(),)

    def summary(self, settings):
        sparsities = [setting["sparsity"] for setting in settings.values.values()]
        if not sparsities:
            return "none of them sparse"
        low, high = min(sparsities), max(sparsities)
        return f"{len(sparsities)} sparse at {low:.0%}" + (f" to {high:.0%}" if high > low else "")


def refused_methods() -> list[Edit]:
    """What a model refuses while its decode is sparse."""
    return [
        RefuseMethod("_get_candidate_generator", NOT_LOSSLESS),
        RefuseMethod("generate_batch", NO_PAGES),
        RefuseMethod("init_continuous_batching", NO_PAGES),
    ]


def refusing_broken_inputs(name: str, listener: Callable, module: nn.Module, *values) -> None:
    """A hook that calls `listener(module, *values)`, and says what is wrong where it meets scores that are no numbers.

    Raises:
        UnsupportedModelError: NaN or infinite activations.
    """
    try:
        listener(module, *values)
    except ValueError:
        reason = "the calibration pass met NaN or infinite activations there"
        remedy = "load the model in a dtype that it runs in, such as torch.bfloat16 or torch.float32"
        raise UnsupportedModelError(name, type(module).__qualname__, reason, remedy) from None
