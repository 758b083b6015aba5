"""Numbers in other forms than torch's: arrays and lists as tensors, numpy's integers as Python's.

Owns: these conversions.
Does not know: what the numbers mean; torch, until there is something to convert. What it cannot
convert it gives back, for a check to refuse.
"""

from numbers import Real
from operator import index
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_ARRAYS = ("numpy", "pandas", "polars", "jax", "jaxlib", "cupy")


def as_tensor(
    value: Any, dtype: "torch.dtype | None" = None, device: "torch.device | None" = None
) -> Any:
    """The tensor of an array or of nested lists of numbers; anything else as it is.

    Args:
        value: anything.
        dtype: of numbers in lists, whose own says nothing; an array keeps the one that it has.
        device: where the tensor is made.
    """
    import torch

    try:
        if _are_numbers(value):
            return torch.tensor(value, dtype=dtype, device=device)
        if type(value).__module__.partition(".")[0] in _ARRAYS:
            # a copy: what is not writable, or has negative strides, torch does not share
            return torch.tensor(value.__array__().copy(), device=device)
    except (TypeError, ValueError, RuntimeError, OverflowError, AttributeError):
        pass
    return value


def whole(value: Any) -> Any:
    """A Python integer for an integer of numpy or in a tensor; anything else as it is."""
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        return value
    try:
        return index(value)
    except (TypeError, ValueError, RuntimeError):
        return value


def _are_numbers(value: Any) -> bool:
    """Lists of numbers, or of such lists, and not of arrays or tensors."""
    if not isinstance(value, (list, tuple)):
        return False
    return all(isinstance(each, Real) or _are_numbers(each) for each in value)
