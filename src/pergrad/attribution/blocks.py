"""A block of the curvature: one weight, with its bias where one op adds both.

Owns: how a block's parameters lie in one matrix (for each group of a convolution), which factors
give its uses, and how gradients are turned into a basis and back.
Does not know: how curvature is estimated, data sets, files.

A block's gradient is G[b, n] = Σ_t left[b, n, t] ⊗ right[b, n, t], for each group n a matrix of
`rows` x `columns`; a bias is one column more (one row more where the weight is (inputs, outputs)).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from pergrad.engine.places import module_of
from pergrad.errors import UnsupportedError
from pergrad.factors import (
    Correlation,
    Factor,
    Isometry,
    Mapped,
    Outer,
    Placed,
    Rows,
    Sum,
    Zero,
)
from pergrad.factors.workspace import chunks, limit

MOST_SIDE = 8192  # a wider side keeps its coordinates: its basis would take minutes and gigabytes
Grads = Mapping[str, Tensor]


@dataclass(frozen=True)
class Block:
    """Which parameters, and how they lie in one matrix.

    `how` is "outer" (a layer's weight), "table" (looked up by rows), "shared" (several uses of
    different kinds, such as a tied embedding), "vector" (scales and biases on their own) or
    "diagonal" (no rule: each number on its own).
    """

    weight: str
    bias: str | None
    how: str
    groups: int
    rows: int
    columns: int
    bias_is_row: bool = False
    steps: tuple[Any, ...] | None = None  # of the isometry from the matrix to the parameter
    source: tuple[int, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(groups, rows, columns), with the bias."""
        row = int(self.bias is not None and self.bias_is_row)
        column = int(self.bias is not None and not self.bias_is_row)
        return self.groups, self.rows + row, self.columns + column

    @cached_property
    def isometry(self) -> Isometry | None:
        """From the matrix's coordinates to the parameter's."""
        if self.steps is None:
            return None
        return Isometry(self.source, tuple((kind, tuple(how)) for kind, how in self.steps))

    def matrix(self, grads: Grads) -> Tensor:
        """(K, groups, rows, columns) from name -> (K, *shape)."""
        W = grads[self.weight]
        K = len(W)
        if self.isometry is not None:
            W = self.isometry.invert(W)
        W = W.reshape(K, self.groups, self.rows, self.columns)
        if self.bias is None:
            return W
        b = grads[self.bias].to(W)
        if self.bias_is_row:
            return torch.cat([W, b.reshape(K, self.groups, 1, self.columns)], 2)
        return torch.cat([W, b.reshape(K, self.groups, self.rows, 1)], 3)

    def grads(self, matrix: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """name -> (K, *shape) from (K, groups, rows, columns)."""
        K, found = len(matrix), {}
        if self.bias is not None:
            b = matrix[:, :, self.rows, :] if self.bias_is_row else matrix[..., self.columns]
            found[self.bias] = b.reshape(K, *shapes[self.bias])
        W = matrix[:, :, : self.rows, : self.columns]
        if self.isometry is not None:
            W = self.isometry.apply(W.reshape(K, *self.source))
        return {self.weight: W.reshape(K, *shapes[self.weight]), **found}

    def extended(self, part: Outer) -> tuple[Tensor, Tensor]:
        """left (n, N, T, rows) and right (n, N, T, columns), with ones where the bias is."""
        left, right = part.g.to(part.dtype), part.a.to(part.dtype)
        if self.bias is not None:
            ones = left.new_ones((*left.shape[:3], 1))
            if self.bias_is_row:
                left = torch.cat([left, ones], 3)
            else:
                right = torch.cat([right, ones], 3)
        return left, right

    def dense(self, factors: Mapping[str, Factor]) -> Iterator[Tensor]:
        """(n, groups, rows, columns): the gradients themselves, some examples at a time."""
        own = [factors[name] for name in self.names]
        each = 3 * sum(f.bytes_per_row for f in own)
        for rows in chunks(own[0].batch, each, limit(own[0].device)):
            yield self.matrix(
                {n: f.select(rows).dense() for n, f in zip(self.names, own, strict=True)}
            )


def uses(factor: Factor) -> list[Factor] | None:
    """The factor's uses, each an Outer, a Correlation or Rows; None where there is another kind."""
    if isinstance(factor, Zero):
        return []
    if isinstance(factor, (Outer, Correlation, Rows)):
        return [factor]
    if isinstance(factor, (Placed, Mapped)):
        return uses(factor.factor)
    if isinstance(factor, Sum):
        parts = [uses(part) for part in factor.factors]
        return None if any(p is None for p in parts) else [f for p in parts for f in p or ()]
    return None


def _isometry(factor: Factor) -> Isometry | None:
    """The one between the uses' coordinates and the parameter's; None for none.

    Raises:
        ValueError: the uses have different ones.
    """
    if isinstance(factor, Mapped):
        return factor.isometry
    if isinstance(factor, Placed):
        return _isometry(factor.factor)
    if isinstance(factor, Sum):
        found = {_isometry(part) for part in factor.factors if not isinstance(part, Zero)}
        if len(found) > 1:
            raise ValueError("uses in different coordinates")
        return found.pop() if found else None
    return None


def matrix_of(use: Factor) -> tuple[int, int, int]:
    """(groups, rows, columns) in which a use is a sum of outer products."""
    if isinstance(use, (Outer, Correlation)):
        N, _, p, d = use.sizes
        return N, p, d
    rows, columns = use.matrix_shape
    return 1, rows, columns


def block_of(name: str, factor: Factor) -> Block:
    """The block of one parameter, without its bias."""
    size = prod(factor.shape)
    if len(factor.shape) <= 1:
        if size <= MOST_SIDE:
            return Block(name, None, "vector", 1, size, 1)
        return Block(name, None, "diagonal", 1, size, 1)
    parts = uses(factor)
    rows, columns = factor.matrix_shape
    plain = Block(name, None, "diagonal", 1, rows, columns)
    if not parts:
        return plain
    try:
        isometry = _isometry(factor)
    except ValueError:
        return plain
    shapes = {matrix_of(part) for part in parts}
    if len(shapes) > 1 or prod(next(iter(shapes))) != size:
        return plain
    N, p, d = shapes.pop()
    how = "outer"
    if any(isinstance(part, Rows) for part in parts):
        how = "table" if all(isinstance(part, Rows) for part in parts) else "shared"
    elif len(parts) > 1:
        how = "shared"
    steps = None if isometry is None else isometry.steps
    source = () if isometry is None else isometry.source
    return Block(name, None, how, N, p, d, False, steps, source)


def blocks_of(factors: Mapping[str, Factor]) -> list[Block]:
    """The blocks of a model, each bias with the weight whose op adds it.

    A bias is known by its numbers: for every example its gradient is the sum over positions of what
    the weight's gradient has on one side. That holds whatever modules and parameters are called.
    """
    found = {n: block_of(n, f) for n, f in factors.items()}
    for name in [n for n, block in found.items() if block.how == "vector"]:
        for weight in _candidates(name, found):
            row = _adds(factors[weight], found[weight], factors[name])
            if row is not None:
                old = found[weight]
                found[weight] = Block(
                    weight, name, old.how, old.groups, old.rows, old.columns, row, old.steps,
                    old.source,
                )  # fmt: skip
                del found[name]
                break
    return list(found.values())


def _candidates(bias: str, blocks: Mapping[str, Block]) -> list[str]:
    """Weights of the same module without a bias yet, those right before it first."""
    names = list(blocks)
    at = names.index(bias)
    order = [*reversed(names[:at]), *names[at + 1 :]]
    return [
        n for n in order
        if blocks[n].how in ("outer", "shared") and blocks[n].bias is None
        and module_of(n) == module_of(bias)
    ]  # fmt: skip


def _adds(weight: Factor, block: Block, bias: Factor) -> bool | None:
    """Whether the bias is a row (True) or a column (False) of the weight's block; None: neither."""
    parts = uses(weight)
    if not parts or any(isinstance(part, Rows) for part in parts):
        return None
    b = bias.dense().reshape(bias.batch, -1)
    for row, count in ((False, block.rows), (True, block.columns)):
        if block.groups * count != b.shape[1]:
            continue
        total, size = _summed(weight, row)
        total = total.to(b)
        # sums over positions may cancel: what rounding explains is relative to their terms
        scale = float(size)
        off = float((total - b).abs().max())
        if scale > 0 and off <= 1e2 * torch.finfo(b.dtype).eps * scale:
            return row
    return None


def _summed(part: Factor, right: bool) -> tuple[Tensor, Tensor]:
    """(B, N * size): the sum over positions of one side of all uses; and the largest sum of sizes.

    Of examples that are not in a `Placed`, such as those that an expert does not see, 0.
    """
    if isinstance(part, Placed):
        values, most = _summed(part.factor, right)
        return part.spread(values), most
    if isinstance(part, Mapped):
        return _summed(part.factor, right)
    if isinstance(part, Sum):
        found = [_summed(f, right) for f in part.factors]
        return torch.stack([v for v, _ in found]).sum(0), torch.stack([s for _, s in found]).sum()
    if isinstance(part, Correlation):
        if not right:
            g = part.g.to(part.dtype).flatten(2)
            return g.sum(2), g.abs().sum(2).max()
        pieces = [_summed(piece, right) for piece in outers(part)]
        return torch.cat([v for v, _ in pieces]), torch.stack([s for _, s in pieces]).max()
    assert isinstance(part, Outer)
    x = (part.a if right else part.g).to(part.dtype)
    return x.sum(2).flatten(1), x.abs().sum(2).max()


def outers(use: Factor) -> Iterator[Outer]:
    """A use as Outers over some examples at a time: patches are never laid out for all."""
    if isinstance(use, Outer):
        each = 2 * use.g[:1].numel() + 2 * use.a[:1].numel()
        for rows in chunks(use.batch, each * use.dtype.itemsize, limit(use.device)):
            yield use if rows == slice(0, use.batch) else use.select(rows)  # type: ignore[misc]
    elif isinstance(use, Correlation):
        for rows in chunks(use.batch, 2 * use.patch_bytes, limit(use.device)):
            yield use.outer(rows)


def check_block(block: Block, factors: Mapping[str, Factor]) -> None:
    """The factors of another batch are of the kind that the block was made for.

    Raises:
        UnsupportedError: they are not, so that sums over batches would not belong together.
    """
    factor = factors[block.weight]
    if isinstance(factor, Zero):
        return
    now = block_of(block.weight, factor)
    same = (now.groups, now.rows, now.columns, now.steps) == (
        block.groups, block.rows, block.columns, block.steps)  # fmt: skip
    served = now.how == block.how or {now.how, block.how} <= {"outer", "shared", "table"}
    if block.how != "diagonal" and not (same and served):
        raise UnsupportedError(
            f"The gradients of `{block.weight}` come in another form in this batch ({now.how}) "
            f"than in the first one ({block.how}), so their curvature cannot be added up. Use "
            'kind="diagonal", or batches that go through the same ops.'
        )
    if block.bias is not None and not isinstance(factors[block.bias], Zero):
        row = _adds(factor, block, factors[block.bias])
        if row is not block.bias_is_row and float(factors[block.bias].sq_norms().max()) > 0:
            raise UnsupportedError(
                f"`{block.bias}` is added to the product with `{block.weight}` in the first batch, "
                'and not in this one. Use kind="diagonal", or batches that go through the same ops.'
            )
