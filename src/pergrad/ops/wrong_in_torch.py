"""What is wrong with torch's own backward of some ops, and for which tensors.

Owns: batch norm's on the CPU, of torch 2.13 (findings/torch_batch_norm_*.sh).
Does not know: where in a graph such an op is, when it is looked for.

Its backward goes through memory from beginning to end. It takes input and gradient for alike if
both are dense and both, or neither, look like "channels last". But a tensor with a dimension of
size 1 can be dense in either order and look like neither. And where channels lie side by side it
takes weight and statistics for dense, which a column of a table is not.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from pergrad.graph import nodes
from pergrad.graph.ops import Shape, flawed, saved
from pergrad.ops.normalisation import in_training

_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_VECTORS = ("weight", "running_mean", "running_var")


def _two_orders(shape: Shape) -> bool:
    """Whether it can be dense in two orders that are not the same, and look like neither."""
    return len(shape) in _LAST and 1 in shape and shape[1] > 1 and prod(shape[2:]) > 1


@flawed(
    "native_batch_norm", "native_batch_norm_legit", "native_batch_norm_legit_no_training",
    "batch_norm_with_update", "batch_norm_no_update", shapes=_two_orders, vectors=_VECTORS,
)  # fmt: skip
def _batch_norm(name: str, node: Any, g: Tensor) -> str | None:
    strewn = _strewn(name, node)
    if not strewn and not _two_orders(tuple(g.shape)):
        return None
    x = saved(name, node, "input")
    last = _LAST.get(g.dim())
    dense = [x.is_contiguous(), g.is_contiguous()]
    turned = [last is not None and t.is_contiguous(memory_format=last) for t in (x, g)]
    if not (dense[0] or turned[0]) or not (dense[1] or turned[1]):
        return None  # torch takes another way, which is right
    if _looks_turned(x) != _looks_turned(g):
        return None
    if not all(dense) and not all(turned):
        format_ = "" if turned[0] else f"memory_format={last}"
        return (
            f"for tensors of shape {tuple(g.shape)} of which one lies in memory in another order "
            "than the gradient that arrives: it takes elements from wrong places, in your training "
            f"too. Pass its input through `.contiguous({format_})`"
        )
    if strewn and (prod(g.shape[2:]) == 1 or not dense[0]):
        return (
            f"for vectors that do not lie dense in memory ({', '.join(strewn)}), such as a column "
            "of a table: it takes numbers from beside them, in your training too. Pass them "
            "through `.contiguous()`"
        )
    return None


def _strewn(name: str, node: Any) -> list[str]:
    """The vectors that its backward takes from wrong places, if it takes them for dense."""
    found = []
    for field in _VECTORS[:1] if in_training(name, node) else _VECTORS:
        if field == "running_mean" and nodes.edges(node)[1][0] is None:
            continue  # only the gradient of a weight has to do with it
        vector = saved(name, node, field)
        if vector is not None and len(vector) > 1 and vector.stride(0) != 1:
            found.append(field)
    return found


def _looks_turned(t: Tensor) -> bool:
    """Whether torch takes it for channels last (`is_channels_last_strides_2d` and `_3d`)."""
    strides, least = t.stride(), 0
    if t.dim() not in _LAST or strides[1] == 0:
        return False
    for dim in (1, *range(t.dim() - 1, 1, -1), 0):
        if t.shape[dim] == 0 or strides[dim] < least or (dim == 0 and least == strides[1]):
            return False
        least = strides[dim] * max(1, t.shape[dim])
    return True
