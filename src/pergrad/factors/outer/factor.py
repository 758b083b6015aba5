"""`Outer`: sums of outer products, from linear layers, convolutions, experts.

Owns: the class, and its products with a fixed direction or fixed weights.
Does not know: the formulas of norms (`norms`) and of products of two factors (`products`), where g
and a came from.
"""

from collections.abc import Callable, Hashable, Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from pergrad.factors import costs
from pergrad.factors.base import Factor
from pergrad.factors.constants import constants
from pergrad.factors.dense import Dense
from pergrad.factors.guard import SqNorms
from pergrad.factors.isometry import Isometry, isometry
from pergrad.factors.methods.choice import Method
from pergrad.factors.methods.fused import kernel_for
from pergrad.factors.numeric import (
    Index,
    added,
    columns,
    flat_rows,
    ordinary,
    product,
    result_dtype,
    row_dots,
    row_sums,
    row_weights,
    take_turns,
    tracing,
)
from pergrad.factors.outer import moments, norms
from pergrad.factors.workspace import SMALL_BYTES, by_chunks, chunks, lent, limit, scratch


class Outer(Factor):
    """G[b] = for each group n: Σ_t g[b,n,t] ⊗ a[b,n,t], not formed unless asked.

    Args:
        g: (B, N, T, p), or (B, T, p) for one group: the gradient at the op's output.
        a: (B, N, T, d), or (B, T, d): the op's input.
        shape: the parameter's; its elements in order are those of the matrix (N p, d).
    """

    both: norms.Both | None = None

    multilinear = True

    def __init__(
        self,
        g: Tensor,
        a: Tensor,
        shape: tuple[int, ...] | None = None,
        both: norms.Both | None = None,
    ) -> None:
        if g.dim() == 3:
            g, a = g.unsqueeze(1), a.unsqueeze(1)
        left, right = tuple(g.shape), tuple(a.shape)
        if len(left) != 4 or len(right) != 4 or left[:3] != right[:3]:
            raise ValueError(f"g {left} and a {right} do not fit (B, N, T, _).")
        B, N, _, p = left
        natural = (N * p, right[3])
        shape = natural if shape is None else tuple(shape)
        if shape != natural and prod(shape) != prod(natural):
            raise ValueError(f"A matrix {natural} is no parameter of shape {shape}.")
        super().__init__(B, shape, g.device, result_dtype(g, a))
        self.sizes = (N, left[2], p, right[3])  # (N, T, p, d)
        self.g = g
        self.a = a
        self.both = both  # the norms of this and of a bias, if they are taken together

    @property
    def aligned(self) -> bool:
        """Whether the parameter seen as a matrix is (N p, d)."""
        N, _, p, d = self.sizes
        return self.matrix_shape == (N * p, d)

    def dense(self) -> Tensor:
        """(B, *shape)."""
        return product(self.g, self.a, self.dtype).reshape(self.batch, *self.shape)

    def tile(self, lo: int, hi: int) -> Tensor:
        """(B, (hi - lo) * C); groups that the tile touches partly are formed whole."""
        _, _, p, d = self.sizes
        wide = self.matrix_shape[1]
        start, stop = lo * wide, hi * wide  # in elements of the parameter
        if stop <= start:
            return self._zeros(self.batch, 0)
        first, last = start // d, -(-stop // d)  # rows of the matrix (N p, d)
        n, m = first // p, -(-last // p)
        g = self.g[:, n:m]
        if m - n == 1:
            g = g[..., first - n * p : last - n * p]
        else:
            first = n * p
        formed = product(g, self.a[:, n:m], self.dtype).flatten(1)
        return formed[:, start - first * d : stop - first * d]

    def pick(self, rows: Tensor) -> Tensor | None:
        """(B, U, d): rows of the matrix, from the columns of g that they need."""
        if self.g.shape[1] != 1 or not self.aligned:
            return None
        return product(self.g[..., rows], self.a, self.dtype).squeeze(1)

    def sq_norms(self) -> Tensor:
        """‖G[b]‖², by the cheapest of `norms.METHODS`."""
        return self.sq_norms_and_doubts().settled()

    def sq_norms_and_doubts(self) -> SqNorms:
        """A Gram's are in doubt where they cancel."""
        if self.both is not None:
            return self.both.of_product()
        return norms.sq_norms(self.g, self.a)[0]

    @property
    def _method(self) -> Method:
        if self.both is not None:
            return self.both.method
        return norms.method_for(self.g, self.a, kernel=kernel_for(self.g, self.a))

    @property
    def norm_method(self) -> str:
        """The name of one of `norms.METHODS`."""
        return self._method.name

    @property
    def norm_cost(self) -> int:
        """Multiply-adds of that method."""
        N, T, p, d = self.sizes
        by = constants(self.device, self.dtype)
        return self.batch * N * self._method.count(norms.Sizes(T, p, d), by)

    def formed(self) -> Factor:
        """The rows, if the norms form them anyway and they are not larger."""
        rows = self.smaller_formed and self.norm_method == "direct"
        return Dense(self.dense()) if rows else self

    def met_by(self, others: int) -> Factor:
        """The rows, unless Grams of positions are less work than products with them."""
        _, T, p, d = self.sizes
        by = constants(self.device, self.dtype)
        tiles = costs.outer_gram_method(others, self.batch, T, T, p, d, by=by) == "tiles"
        return Dense(self.dense()) if tiles else self

    def absorb(self, chain: Isometry) -> Factor:
        """A view is another shape; a transposition swaps g and a, where the matrix is the whole."""
        N, _, p, d = self.sizes
        kind, how = chain.steps[0]
        if kind == "view":
            taken = Outer(self.g, self.a, how, self.both)
        elif N == 1 and self.shape == (p, d) and how == (1, 0):
            taken = Outer(self.a, self.g, both=self.both)
        elif self.shape == (N, p, d) and how == (0, 2, 1):
            taken = Outer(self.a, self.g, (N, d, p), self.both)
        else:
            return super().absorb(chain)
        if len(chain.steps) == 1:
            return taken
        rest = isometry(taken.shape, chain.steps[1:])
        return taken.absorb(rest) if rest.steps else taken

    @property
    def joins(self) -> Hashable:
        """Those of the same sizes: one after the other along T costs at most their cross terms."""
        N, _, p, d = self.sizes
        return Outer, N, p, d

    def joined(self, others: Sequence["Outer"]) -> "Outer":
        """One after the other along T."""
        g, a = (torch.cat(sides, 2) for sides in zip(self.tensors(), *(f.tensors() for f in others),
                                                     strict=True))  # fmt: skip
        return Outer(g, a, self.shape)

    @property
    def stacks(self) -> Hashable:
        """Those of about as many positions: the fewer are filled up with zeros."""
        N, T, p, d = self.sizes
        return Outer, self.shape, N, p, d, T.bit_length(), self.g.dtype, self.a.dtype

    def stacked(self, others: Sequence["Outer"]) -> "Outer":
        """One after the other along B."""
        parts = (self, *others)
        most = max(f.sizes[1] for f in parts)
        g, a = (
            torch.cat([pad(x, (0, 0, 0, most - x.shape[2])) for x in side])
            for side in zip(*(f.tensors() for f in parts), strict=True)
        )
        return Outer(g, a, self.shape)

    def matvec(self, v: Tensor) -> Tensor:
        """Σ_t g_t · (V a_t): one matrix product as in a forward pass, no T²."""
        N, T, p, d = self.sizes
        V = v.to(self.device, self.dtype).reshape((p, d) if N == 1 else (N, p, d))
        narrow = N * T * (2 * min(p, d) + max(p, d)) * self.dtype.itemsize
        if self.batch * narrow <= limit(self.device):
            return self._passed(self.g, self.a, V)
        return by_chunks(self.batch, narrow,
                         lambda rows: self._passed(self.g[rows], self.a[rows], V),
                         like=self._zeros(0))  # fmt: skip

    def _passed(self, g: Tensor, a: Tensor, V: Tensor) -> Tensor:
        N, _, p, d = self.sizes
        g, a = g.to(self.dtype), a.to(self.dtype)
        if N == 1:  # one product for all examples and positions
            turns = take_turns(g)
            one, two = flat_rows(g, turns=turns), flat_rows(a, turns=turns)
            found = _forms(one, V, two) if d < p else _forms(two, V.mT, one)
            return row_sums(found, len(g), turns=turns)
        return row_dots(torch.matmul(g, V), a) if d < p else row_dots(torch.matmul(a, V.mT), g)

    def weighted_sum(self, c: Tensor) -> Tensor:
        """Σ_bt c[b] g[b,t] ⊗ a[b,t]: one matrix product as in a plain backward pass."""
        N, T, p, d = self.sizes
        c = c.to(self.device, self.dtype)
        each = N * T * (p + d + min(p, d)) * self.dtype.itemsize
        if self.batch * each <= limit(self.device):
            return self._weighed(self.g, self.a, c).reshape(self.shape)
        first, *rest = chunks(self.batch, each, limit(self.device))
        total = self._weighed(self.g[first], self.a[first], c[first])
        for rows in rest:
            total += self._weighed(self.g[rows], self.a[rows], c[rows])
        return total.reshape(self.shape)

    def _weighed(self, g: Tensor, a: Tensor, c: Tensor) -> Tensor:
        """(N, p, d)."""
        N, T, p, d = self.sizes
        g, a = g.to(self.dtype), a.to(self.dtype)
        if N != 1:
            g, a = (g * columns(c, g), a) if p < d else (g, a * columns(c, a))
            left, right = (
                x.transpose(0, 1).reshape(N, x.shape[0] * x.shape[2], x.shape[3]) for x in (g, a)
            )
            return torch.bmm(left.mT, right)
        turns = take_turns(g)
        one, two = flat_rows(g, turns=turns), flat_rows(a, turns=turns)
        weights = row_weights(c, T, turns=turns)[:, None]
        # mm writes straight to its result, bmm of one matrix does not
        small = one if p < d else two
        if small.numel() * self.dtype.itemsize < SMALL_BYTES or not ordinary(g, a, c):
            scaled = small * weights
            return torch.mm(scaled.mT, two) if p < d else torch.mm(one.mT, scaled)
        with lent(small.numel(), self.dtype, self.device) as buffer:
            scaled = torch.mul(small, weights, out=buffer.view(small.shape))
            return torch.mm(scaled.mT, two) if p < d else torch.mm(one.mT, scaled)

    def second_moment(self, c: Tensor) -> Tensor:
        """Of one position each, (g ⊗ a)² = g² ⊗ a²: one product. Else from gradients, formed."""
        N, T, p, d = self.sizes
        c = c.to(self.device, self.dtype)
        if 0 in (self.batch, N, T, p, d):
            return self._zeros(*self.shape)
        if T > 1:
            return moments.direct(self.g, self.a, c).reshape(self.shape)
        total = self._zeros(N, p, d)
        for rows in chunks(self.batch, 2 * N * (p + d) * self.dtype.itemsize, limit(self.device)):
            g, a = moments.squares(self.g[rows].to(self.dtype), self.a[rows].to(self.dtype))
            total = added(total, self._weighed(g, a, c[rows]).reshape(N, p, d))
        return total.reshape(self.shape)

    def scale(self, c: Tensor) -> "Outer":
        """The smaller of g and a times c[b]."""
        c = c.to(self.device, self.dtype)
        if self.a.numel() < self.g.numel():
            return Outer(self.g, self.a.to(self.dtype) * columns(c, self.a), self.shape)
        return Outer(self.g.to(self.dtype) * columns(c, self.g), self.a, self.shape)

    def _select(self, index: Index) -> "Outer":
        return Outer(self.g[index], self.a[index], self.shape)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Outer":
        return Outer(change(self.g), change(self.a), self.shape)

    def _kronecker(self, A: Tensor | None, S: Tensor | None) -> Factor:
        N, _, p, _ = self.sizes
        if not self.aligned or (N > 1 and S is not None and S.dim() == 2):
            return super()._kronecker(A, S)  # S mixes groups: no Outer of the same kind
        g, a = self.g, self.a
        if A is not None:
            a = a.to(self.dtype)
            a = a * A if A.dim() == 1 else a @ A
        if S is not None:
            g = g.to(self.dtype)
            g = g * S.reshape(N, 1, p) if S.dim() == 1 else g @ S.mT
        return Outer(g, a, self.shape)

    def tensors(self) -> tuple[Tensor, ...]:
        """`g` and `a`."""
        return (self.g, self.a)


def _forms(x: Tensor, W: Tensor, y: Tensor) -> Tensor:
    """(n,): x[i] · W y[i], rows of matrices; x W a piece at a time, which stays in the caches."""
    count, wide = y.shape
    if tracing(x, W, y):
        return ((x @ W) * y).sum(1)
    each, budget = wide * y.dtype.itemsize, scratch(y.device)
    if count * each <= budget or not ordinary(x, W, y):
        return torch.mm(x, W).mul_(y).sum(1)
    pieces = chunks(count, each, budget)
    with lent(pieces[0].stop * wide, y.dtype, y.device) as buffer:
        room = buffer.view(pieces[0].stop, wide)
        found = [
            torch.mm(x[rows], W, out=room[: rows.stop - rows.start]).mul_(y[rows]).sum(1)
            for rows in pieces
        ]
    return torch.cat(found)
