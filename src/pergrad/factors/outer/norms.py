"""Norms of `Outer`: four exact methods, and the guard between them.

Owns: `METHODS`, the formulas of `sq_norms`, and when a Gram's result may not be trusted.
Does not know: other factors. Everything here works on the tensors g (B,N,T,p) and a (B,N,T,d).
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pergrad.factors import costs
from pergrad.factors.constants import constants
from pergrad.factors.guard import SqNorms, held_against
from pergrad.factors.methods import choice
from pergrad.factors.methods.fused import fused_gram, kernel_for
from pergrad.factors.methods.grams import gram
from pergrad.factors.numeric import last_squares, product, result_dtype, row_squares, tracing
from pergrad.factors.workspace import by_chunks, chunks, lent, scratch
from pergrad.kernels import Fused


class Both:
    """The norms of a weight and of the bias that the same op adds, taken together.

    ‖Σ_t s_t‖², a bias' squared norm, is the sum of all entries of the Gram of the side s, which the
    weight's norm forms anyway. Whoever is asked first takes both.

    Args:
        g, a: those of the weight's `Outer`, of one group.
        side: which of the two the bias sums, 0 or 1.
    """

    def __init__(self, g: Tensor, a: Tensor, side: int) -> None:
        self.g, self.a, self.side = g, a, side
        self._taken: tuple[SqNorms, SqNorms | None] | None = None

    def __reduce__(self) -> tuple[object, ...]:
        """For pickle: without what has been taken."""
        return Both, (self.g, self.a, self.side)

    @property
    def method(self) -> choice.Method:
        """How they are taken."""
        return method_for(self.g, self.a, self.side, kernel_for(self.g, self.a))

    @property
    def tells(self) -> bool:
        """Whether what is taken tells the bias' norms."""
        return self.method.tells_sums

    def _norms(self) -> tuple[SqNorms, SqNorms | None]:
        if self._taken is None:
            self._taken = sq_norms(self.g, self.a, self.side)
        return self._taken

    def of_product(self) -> SqNorms:
        """(B,): the weight's."""
        return self._norms()[0]

    def of_sum(self) -> SqNorms | None:
        """(B,): the bias'; None if it has to take its own."""
        return self._norms()[1]


def sq_norms(g: Tensor, a: Tensor, side: int | None = None) -> tuple[SqNorms, SqNorms | None]:
    """(B,): ‖Σ_t g[b,n,t] ⊗ a[b,n,t]‖², summed over groups; and those of the sums of a side.

    For the sums None if none are asked for, or the method does not tell.
    """
    (norms, sizes), sums = unrepaired(g, a, side)
    products = held_against(norms, sizes, lambda rows: direct(g[rows], a[rows]))
    if sums is None or side is None:
        return products, None
    summed, dtype = (g, a)[side], result_dtype(g, a)

    def again(rows: Tensor) -> Tensor:
        return row_squares(summed[rows, 0].sum(1, dtype=dtype))

    return products, held_against(*sums, again)


Pair = tuple[Tensor, Tensor | None]  # norms, and what they are held against; None: to be trusted
Pairs = tuple[Pair, Pair | None]  # of the products, and of the sums of a side


def unrepaired(g: Tensor, a: Tensor, side: int | None = None) -> Pairs:
    """The same, whether or not they may be trusted: with |A|²|G|², or T |S|² of the side."""
    if g.numel() == 0 or a.numel() == 0:
        return (g.new_zeros(len(g), dtype=result_dtype(g, a)), None), None
    if g.shape[2] == 1:
        return by_rows(g, a, side, None)  # nothing to choose from
    kernel = kernel_for(g, a)
    taken: Pairs = method_for(g, a, side, kernel).norms(g, a, side, kernel)
    return taken


def method_for(
    g: Tensor, a: Tensor, side: int | None = None, kernel: Fused | None = None
) -> choice.Method:
    """Which method `sq_norms` takes; `kernel`: the one that serves these, if any."""
    p, d = g.shape[3], a.shape[3]
    sizes = Sizes(g.shape[2], p, d, kernel is not None, 0 if side is None else (p, d)[side])
    return choice.cheapest(METHODS, sizes, constants(g.device, result_dtype(g, a)))


def by_rows(g: Tensor, a: Tensor, side: int | None, _: Fused | None) -> Pairs:
    """T = 1: Σ_n |g_n|² |a_n|², N (p + d) multiply-adds; and that of the side of one group."""
    dtype = result_dtype(g, a)
    left, right = last_squares(g, dtype), last_squares(a, dtype)  # (B, N, 1), no copy on the way
    if g.shape[1] > 1:
        return ((left * right).flatten(1).sum(1), None), None
    sums = None if side is None else ((left, right)[side].reshape(-1), None)
    return ((left * right).reshape(-1), None), sums


def by_gram(g: Tensor, a: Tensor, side: int | None, _: Fused | None) -> Pairs:
    """From the Grams of all positions, by torch's products."""
    norms, sizes, *more = gram(g, a, side)
    return (norms, sizes), (more[0], more[1]) if more else None


def by_kernel(g: Tensor, a: Tensor, side: int | None, kernel: Fused | None) -> Pairs:
    """The same by the compiled kernel."""
    assert kernel is not None
    results, doubtful = fused_gram(kernel, g, a)
    norms = results[0], results[1] if doubtful[0] else None
    if side is None:
        return norms, None
    i = 1 + side
    return norms, (results[2 * i], results[2 * i + 1] if doubtful[i] else None)


def directly(g: Tensor, a: Tensor, _side: int | None, _: Fused | None) -> Pairs:
    """From the gradients, formed."""
    return (direct(g, a), None), None


def direct(g: Tensor, a: Tensor) -> Tensor:
    """Form gᵀ a in one reused buffer, square, sum. N T p d multiply-adds."""
    dtype = result_dtype(g, a)
    B, N, _, p = g.shape
    d = a.shape[3]
    budget = scratch(g.device)
    each = p * d * dtype.itemsize
    # not bmm into fresh memory: on a CPU its page faults cost more than the multiplication
    groups = chunks(N, each, budget)
    spans = chunks(p, d * dtype.itemsize, budget) if each > budget else [slice(0, p)]
    widest = min(N, max(1, budget // each)) * spans[0].stop * d
    step = max(1, budget // (widest * dtype.itemsize))

    def piece(rows: slice, buffer: Tensor | None) -> Tensor:
        total = g.new_zeros(rows.stop - rows.start, dtype=dtype)
        for group in groups:
            right = a[rows, group].to(dtype)
            for span in spans:
                formed = product(g[rows, group, :, span], right, dtype, buffer)
                total = total + _sum_of_squares(formed)
        return total

    def pieces(buffer: Tensor | None) -> Tensor:
        return by_chunks(B, widest * dtype.itemsize, partial(piece, buffer=buffer),
                         like=g.new_zeros(0, dtype=dtype), budget=budget)  # fmt: skip

    if tracing(g, a):
        return pieces(None)
    with lent(min(step, B) * widest, dtype, g.device) as buffer:
        return pieces(buffer)


def _sum_of_squares(x: Tensor) -> Tensor:
    """(B,): of (B, N, p, d), row by row."""
    if tracing(x):
        return row_squares(x)  # a norm has no derivative at zero
    # vector_norm is the fastest reduction, but its single running sum loses digits over millions
    # of elements (1e-4 measured): let it do short rows, and pairwise sums the rest
    return torch.linalg.vector_norm(x, dim=3).square().flatten(1).sum(1)


def outer_size(g: Tensor, a: Tensor) -> Tensor:
    """(B,): Σ_n |G_n|² |A_n|², for guards alone: no derivative, no copy."""
    G, A = (torch.linalg.vector_norm(x.detach(), dim=3).square().sum(2) for x in (g, a))
    return (G * A).sum(1)


class Sizes(NamedTuple):
    """What the choice goes by, of one example and group."""

    T: int
    p: int
    d: int
    fused: bool = False  # whether the compiled kernel serves the tensors
    summed: int = 0  # the width of a side whose sum over positions is asked for too: a Gram tells


# Times of the same products in milliseconds stand with the constants that weigh them.
METHODS = (
    choice.Method(
        "rows",
        available=lambda n: n.T <= 1,
        time=lambda n, by: costs.row_norm_cost(n.p, n.d),
        count=lambda n, by: costs.row_norm_cost(n.p, n.d),
        norms=by_rows,
        tells_sums=True,
    ),
    choice.Method(
        "fused",  # lays out all of g and a once
        available=lambda n: n.T > 1 and n.fused,
        time=lambda n, by: (
            by.fused_overhead * costs.fused_norm_cost(n.T, n.p, n.d)
            + by.fused_reading * n.T * (n.p + n.d)
        ),
        count=lambda n, by: costs.fused_norm_cost(n.T, n.p, n.d),
        norms=by_kernel,
        tells_sums=True,
    ),
    choice.Method(
        "gram",
        available=lambda n: n.T > 1 and not n.fused,
        time=lambda n, by: (
            by.gram_overhead
            * (costs.gram_norm_cost(n.T, n.p, n.d) + by.gram_elementwise * n.T * n.T)
        ),
        count=lambda n, by: costs.gram_norm_cost(n.T, n.p, n.d),
        norms=by_gram,
        tells_sums=True,
    ),
    choice.Method(
        "direct",
        available=lambda n: n.T > 1,
        time=lambda n, by: (
            (n.T + by.direct_elementwise) * n.p * n.d + by.sum_reading * n.T * n.summed
        ),
        count=lambda n, by: costs.direct_norm_cost(n.T, n.p, n.d),
        norms=directly,
    ),
)
