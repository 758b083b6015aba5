"""From one loss for each token or pixel to one loss for each example.

Owns: `per_example`.
Does not know: gradients, models.
"""

import torch
from torch import Tensor

from pergrad.arrays import as_tensor
from pergrad.errors import UsageError

_HOW = ("mean", "sum", "root")


def per_example(
    values: Tensor,
    mask: Tensor | None = None,
    how: str = "mean",
    ids: Tensor | None = None,
) -> Tensor:
    """One loss for each example, from its losses by token, pixel or row.

        mean: sum over i of mask[b, i] values[b, i] / n[b]      n[b] = sum over i of mask[b, i]
        sum:  sum over i of mask[b, i] values[b, i]
        root: sum over i of mask[b, i] values[b, i] / sqrt(n[b])

    Under "sum" the norm of a text's gradient grows with the text, under "mean" it shrinks with it;
    "root" lies between, so that long and short texts can be compared.

    Args:
        values: (B, ...), whose first dimension is the example; or, with `ids`, of any shape.
        mask: what counts, in the shape of `values`: booleans, or numbers from 0 to 1. None: all.
        how: "mean", "sum" or "root".
        ids: the example of each value, integers in the shape of `values`, as packed sequences have
            them; whatever is below 0 belongs to none. There are max(ids) + 1 examples.

    Returns:
        (B,), in the dtype of `values`, attached to its graph. 0 for an example of which nothing
        counts. A value that does not count may be anything, NaN too.

    Raises:
        UsageError: shapes or dtypes do not fit, or `how` is none of these.

    Cost: one pass over the values; with `ids`, a GPU is waited for once.

        >>> import torch, pergrad
        >>> values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
        >>> mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
        >>> pergrad.per_example(values, mask)
        tensor([2., 4.])
        >>> pergrad.per_example(values[0], ids=torch.tensor([0, 1, 1]), how="sum")
        tensor([1., 5.])
    """
    if isinstance(values, Tensor):
        mask, ids = (as_tensor(each, device=values.device) for each in (mask, ids))
    _check(values, mask, how, ids)
    counted = torch.ones_like(values, requires_grad=False) if mask is None else mask.to(values)
    if mask is not None:
        # where, not a product alone: what does not count may be NaN, and so would its gradient be
        values = torch.where(mask != 0, values, 0) * counted
    if ids is None:
        total, count = values.flatten(1).sum(1), counted.detach().flatten(1).sum(1)
        if values.dim() == 1:
            total, count = values, counted
    else:
        batch = int(ids.max()) + 1 if ids.numel() else 0
        rows = torch.where(ids < 0, batch, ids).reshape(-1)  # row `batch` is nobody's
        zeros = values.new_zeros(batch + 1)
        total = zeros.index_add(0, rows, values.reshape(-1))[:batch]
        count = zeros.index_add(0, rows, counted.detach().reshape(-1))[:batch]
    if how == "sum":
        return total
    count = torch.where(count == 0, 1, count)
    return total / (count.sqrt() if how == "root" else count)


def _check(values: Tensor, mask: Tensor | None, how: str, ids: Tensor | None) -> None:
    if how not in _HOW:
        raise UsageError(f'`how` is "mean", "sum" or "root", not {how!r}.')
    if not isinstance(values, Tensor) or not values.is_floating_point():
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise UsageError(
            f"`values` is a {kind}. Pass a floating point tensor (B, ...), for instance what "
            '`F.cross_entropy(..., reduction="none")` returns.'
        )
    if values.dim() == 0:
        raise UsageError(
            "`values` is a scalar: the examples have already been averaged or summed. Compute the "
            'loss with reduction="none".'
        )
    shape = tuple(values.shape)
    for name, other in (("mask", mask), ("ids", ids)):
        if other is None:
            continue
        if not isinstance(other, Tensor) or tuple(other.shape) != shape:
            got = tuple(other.shape) if isinstance(other, Tensor) else type(other).__name__
            raise UsageError(
                f"`{name}` is {got}, `values` has shape {shape}: pass one entry for each value. "
                "Labels shifted by one token need a mask shifted likewise: `mask[:, 1:]`."
            )
    if ids is not None and (ids.is_floating_point() or ids.dtype == torch.bool or ids.is_complex()):
        raise UsageError(f"`ids` has dtype {ids.dtype}; pass the number of each value's example.")
