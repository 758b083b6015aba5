"""Which example each element of a cotangent belongs to.

Owns: `Layout`, a map from the elements of one tensor to example numbers, and how such a map
moves through views, broadcasts and reductions.
Does not know: autograd nodes, ops, gradients.

The map is stored compressed: an integer tensor with the tensor's number of dimensions, in which
every dimension along which the owner does not change has size 1. A batch-first activation
(B, T, D) has a map of shape (B, 1, 1). The owner -1 means "no gradient arrives here".
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

NOBODY = -1


@dataclass(frozen=True, eq=False, slots=True)
class Layout:
    """The owner of every element of a tensor of the given shape."""

    shape: tuple[int, ...]
    owner: Tensor  # int64, on the CPU; each dimension is 1 or that of `shape`
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)  # what was worked out from it

    def __post_init__(self) -> None:
        assert self.owner.dim() == len(self.shape), (self.owner.shape, self.shape)

    @property
    def varying(self) -> tuple[int, ...]:
        """The dimensions along which the owner changes."""
        return tuple(d for d, size in enumerate(self.owner.shape) if size != 1)

    @property
    def is_constant(self) -> bool:
        """Whether the whole tensor belongs to one example (or to none)."""
        return self.owner.numel() == 1

    def same(self, other: "Layout") -> bool:
        """Equal maps."""
        return self is other or (
            self.owner.shape == other.owner.shape and torch.equal(self.owner, other.owner)
        )

    def examples(self) -> Tensor:
        """The examples that own something here, ascending."""
        owners = self.owner.unique()
        return owners[owners >= 0]

    def rows(self) -> Tensor:
        """The owner of every row when the last dimension is not counted: (prod(shape[:-1]),)."""
        assert self.owner.shape[-1] == 1
        return self.owner[..., 0].expand(self.shape[:-1]).reshape(-1)

    def __repr__(self) -> str:
        return f"Layout({describe(self)}, shape={self.shape})"


def compressed(shape: Sequence[int], owner: Tensor) -> Layout:
    """A layout from a map in which dimensions may be spelled out."""
    for dim, size in enumerate(owner.shape):
        if size > 1:
            first = owner.narrow(dim, 0, 1)
            if bool((owner == first).all()):
                owner = first
        elif size == 0:  # nothing there: nobody's
            return constant(shape, NOBODY)
    return Layout(tuple(shape), owner)


def along(shape: Sequence[int], dim: int, owners: Tensor) -> Layout:
    """Index i of dimension `dim` belongs to owners[i]."""
    view = [1] * len(shape)
    view[dim] = -1
    return compressed(shape, owners.reshape(view))


def placed_along(owner: Tensor, dim: int, size: int, index: slice) -> Tensor:
    """A map with NOBODY along `dim` but where `index` puts `owner`."""
    shape = list(owner.shape)
    shape[dim] = size
    full = torch.full(shape, NOBODY, dtype=torch.int64, device="cpu")
    full[(slice(None),) * dim + (index,)] = owner
    return full


def constant(shape: Sequence[int], example: int) -> Layout:
    """The whole tensor belongs to one example."""
    return Layout(
        tuple(shape), torch.full([1] * len(shape), example, dtype=torch.int64, device="cpu")
    )


def merge(one: Layout, two: Layout) -> Layout | None:
    """The layout of a sum of two gradients; None where two examples meet in one element."""
    if one.same(two):
        return one
    a, b = torch.broadcast_tensors(one.owner, two.owner)
    if bool(((a != b) & (a != NOBODY) & (b != NOBODY)).any()):
        return None
    return compressed(one.shape, torch.maximum(a, b))


def reshape(layout: Layout, shape: Sequence[int]) -> Layout:
    """The same elements in logical order, under another shape."""
    shape = tuple(shape)
    if shape == layout.shape:
        return layout
    if layout.is_constant or 0 in shape:
        return constant(shape, int(layout.owner.max()) if layout.owner.numel() else NOBODY)
    before: list[int] = []  # the map's shape with every block of dimensions that varies spelled out
    after: list[int] = []
    for old, new in _groups(layout.shape, shape):
        block = layout.owner.shape[old.start : old.stop]
        if all(size == 1 for size in block):
            before += block
            after += [1] * len(new)
        else:
            before += layout.shape[old.start : old.stop]
            after += shape[new.start : new.stop]
    return compressed(shape, layout.owner.expand(before).reshape(after))


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[range, range]]:
    """Cut two shapes of equal element count into the shortest blocks of equal element count."""
    groups = []
    i = j = 0
    while i < len(old) or j < len(new):
        start_i, start_j = i, j
        left = right = 1
        if i < len(old):
            left, i = old[i], i + 1
        if j < len(new):
            right, j = new[j], j + 1
        while left != right:
            if (left < right and i < len(old)) or j >= len(new):
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        groups.append((range(start_i, i), range(start_j, j)))
    return groups


def permute(layout: Layout, dims: Sequence[int]) -> Layout:
    """As `tensor.permute(dims)`."""
    return Layout(tuple(layout.shape[d] for d in dims), layout.owner.permute(tuple(dims)))


def reduce_to(layout: Layout, shape: Sequence[int]) -> Layout | None:
    """The layout after a broadcast is summed back to `shape`; None where examples meet."""
    shape = tuple(shape)
    if shape == layout.shape:
        return layout
    owner = layout.owner
    lead = len(layout.shape) - len(shape)
    dims = [d for d in range(lead) if owner.shape[d] > 1]
    dims += [lead + d for d, size in enumerate(shape) if size == 1 and owner.shape[lead + d] > 1]
    if dims:
        lone = _lone_owner(owner, dims)
        if lone is None:
            return None
        owner = lone
    return Layout(shape, owner.reshape(owner.shape[lead:]))


def _lone_owner(owner: Tensor, dims: list[int]) -> Tensor | None:
    """The one owner along `dims`, size 1 there; None if there are several."""
    highest = owner.amax(dims, keepdim=True)
    lowest = torch.where(owner == NOBODY, highest, owner).amin(dims, keepdim=True)
    return highest if torch.equal(highest, lowest) else None


def smear(layout: Layout, dims: Sequence[int]) -> Layout | None:
    """The layout once every element depends on all others along `dims`; None if examples meet."""
    dims = [d for d in dims if layout.owner.shape[d] > 1]
    if not dims:
        return layout
    owner = _lone_owner(layout.owner, dims)
    return None if owner is None else Layout(layout.shape, owner)


def describe(layout: Layout) -> str:
    """In a user's words: how examples lie in this tensor."""
    if layout.is_constant:
        return "one example"
    varying = layout.varying
    first, last = varying[0], varying[-1] + 1
    block = layout.owner.reshape(layout.owner.shape[first:last]).expand(layout.shape[first:last])
    pattern = regular_pattern(block.reshape(-1))
    if pattern is None:
        return "indexed"
    outer, inner = pattern
    if outer * prod(layout.shape[:first]) == 1:
        return "example-major"
    return "sequence-major" if inner == 1 else "outer/inner"


def regular_pattern(owners: Tensor) -> tuple[int, int] | None:
    """(outer, inner) if owners is 0..B-1, each `inner` times, the whole `outer` times."""
    if owners.numel() == 0:
        return None
    count = int(owners.max()) + 1
    if count <= 0 or owners.numel() % count:
        return None
    changes = (owners != owners[0]).nonzero()
    inner = int(changes[0, 0]) if changes.numel() else owners.numel()
    if owners.numel() % (count * inner):
        return None
    outer = owners.numel() // (count * inner)
    ideal = torch.arange(count, device="cpu").repeat_interleave(inner).repeat(outer)
    return (outer, inner) if torch.equal(ideal, owners) else None
