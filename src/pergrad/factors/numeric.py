"""Small numerical helpers that every factor uses.

Owns: result dtypes, the test for "autograd is watching", row sums and products, indices.
Does not know: factors.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pergrad.recording import is_recorded

Index = slice | Tensor


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """The floating dtype of the tensors together, but at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor.dtype != dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def tracing(*tensors: Tensor) -> bool:
    """Whether autograd records: then no buffer may be written twice."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def ordinary(*tensors: Tensor) -> bool:
    """Whether these are numbers in memory that nobody differentiates: a buffer may be written.

    Within vmap and its kin a tensor stands for others, and in forward mode it has a tangent.
    """
    if tracing(*tensors):
        return False
    try:
        for tensor in tensors:
            tensor.data_ptr()
            if forward_ad.unpack_dual(tensor).tangent is not None:
                return False
    except RuntimeError:
        return False
    return True


def squared(x: Tensor) -> Tensor:
    """x², in the memory of x if it may be written, which nobody else may need."""
    # not x.square(), which torch takes as a power
    return x.mul_(x) if ordinary(x) else x * x


def added(total: Tensor, term: Tensor) -> Tensor:
    """`total` + `term`, in the memory of `total` if it may be written."""
    return total.add_(term) if ordinary(total, term) else total + term


def reading_waits(device: torch.device) -> bool:
    """Whether the CPU runs ahead of a device, so that to read a number is to wait until it is done.

    And it has nothing to do afterwards until the CPU has told it more. A recorded graph runs when
    nobody looks.
    """
    return device.type != "cpu" or is_recorded()


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """What the numbers in them take."""
    return sum(t.numel() * t.element_size() for t in tensors)


def flat(x: Tensor) -> Tensor:
    """(B, ...) as (B, elements), also for B = 0 and for x of one dimension."""
    return x.flatten(1) if x.dim() > 1 else x[:, None]


def row_dots(x: Tensor, y: Tensor) -> Tensor:
    """Sum over everything but the first dimension of x * y."""
    # mul + sum, not bmm: torch's sum is pairwise, BLAS' dot of long rows loses two digits
    return flat(x * y).sum(1)


# vector_norm makes one pass and no copy; but it keeps a single running sum, which loses digits over
# millions of elements (1e-4 measured).
LONG_ROW = 2**15


def last_squares(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over the last dimension of x², accumulated in dtype."""
    if tracing(x):  # a norm has no derivative at zero
        return x.to(dtype).square().sum(-1)
    if x.shape[-1] > LONG_ROW:
        parts = [torch.linalg.vector_norm(y, dim=-1, dtype=dtype) for y in x.split(LONG_ROW, -1)]
        return torch.stack(parts, -1).square().sum(-1)
    return torch.linalg.vector_norm(x, dim=-1, dtype=dtype).square()


def row_squares(x: Tensor) -> Tensor:
    """Sum over everything but the first dimension of x²."""
    return last_squares(flat(x), x.dtype)


def columns(c: Tensor, x: Tensor) -> Tensor:
    """`c` (B,) shaped so that it multiplies the rows of x."""
    return c.reshape(-1, *[1] * (x.dim() - 1))


def normal_index(index: Index | int, batch: int, device: torch.device) -> Index:
    """A slice, or a LongTensor of non-negative rows; bool masks and integers become one of them."""
    if isinstance(index, int):
        index = torch.tensor([index], device="cpu")
    if isinstance(index, slice):
        return slice(*index.indices(batch))
    if index.dtype == torch.bool:
        if index.shape != (batch,):
            raise ValueError(f"A mask over {batch} examples has shape {tuple(index.shape)}.")
        return index.nonzero()[:, 0].to(device)
    if index.dim() != 1 or index.is_floating_point():
        raise ValueError(f"An index must be 1-D and integer, not {index.dtype} {index.shape}.")
    index = index.long()
    if index.numel() and not bool(((index >= -batch) & (index < batch)).all()):
        raise IndexError(f"An example's number is out of range for {batch} examples.")
    return torch.where(index < 0, index + batch, index).to(device)


def product(g: Tensor, a: Tensor, dtype: torch.dtype, buffer: Tensor | None = None) -> Tensor:
    """(B, N, p, d): gᵀ a for every example and group, into a flat buffer if one is given."""
    B, N, T, p = g.shape
    d = a.shape[3]
    left = g.to(dtype).reshape(B * N, T, p).mT
    right = a.to(dtype).reshape(B * N, T, d)
    if buffer is None:
        return torch.bmm(left, right).view(B, N, p, d)
    out = buffer[: B * N * p * d].view(B * N, p, d)
    return torch.bmm(left, right, out=out).view(B, N, p, d)


def take_turns(x: Tensor) -> bool:
    """Whether the positions of an example of (B, 1, T, p) are further apart than the examples."""
    return x.shape[2] > 1 and x.stride(0) < x.stride(2)


def flat_rows(x: Tensor, *, turns: bool) -> Tensor:
    """(B, 1, T, p) -> (B T, p), in the order of memory if the examples take turns there."""
    return (x.transpose(0, 2) if turns else x).flatten(0, 2)


def row_weights(c: Tensor, T: int, *, turns: bool) -> Tensor:
    """(B T,): the weight c[b] of each of `flat_rows`."""
    if T == 1:
        return c
    return (c.expand(T, len(c)) if turns else c[:, None].expand(len(c), T)).reshape(-1)


def row_sums(x: Tensor, batch: int, *, turns: bool) -> Tensor:
    """(B,): over the positions of each example, of one number for each of `flat_rows`."""
    if len(x) == batch:
        return x
    T = len(x) // batch
    return x.view(T, batch).sum(0) if turns else x.view(batch, T).sum(1)
