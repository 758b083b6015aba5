"""Norms of `Outer`: three exact methods, and the guard between them.

Owns: the formulas of `sq_norms`, and when a Gram's result may not be trusted.
Does not know: other factors. Everything here works on the tensors g (B,N,T,p) and a (B,N,T,d).
"""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from pergrad.factors import costs
from pergrad.factors.constants import constants
from pergrad.factors.fused_norms import fused_gram, kernel_for
from pergrad.factors.gram_norms import gram
from pergrad.factors.guard import repaired
from pergrad.factors.notes import Notes
from pergrad.factors.numeric import last_squares, product, result_dtype, row_squares, tracing
from pergrad.factors.workspace import by_chunks, chunks, lent, scratch
from pergrad.kernels import Fused

_Found = TypeVar("_Found")


def sq_norms(g: Tensor, a: Tensor, notes: Notes | None = None) -> Tensor:
    """(B,): ‖Σ_t g[b,n,t] ⊗ a[b,n,t]‖², summed over groups."""
    norms, sizes = unrepaired(g, a, notes)
    if sizes is None:
        return norms
    return repaired(norms, sizes, lambda rows: direct(g[rows], a[rows]))


def unrepaired(g: Tensor, a: Tensor, notes: Notes | None = None) -> tuple[Tensor, Tensor | None]:
    """(B,): the same; and |A|²|G|² if a Gram said so that has to be held against them."""
    B, N, T, p = g.shape
    if 0 in (B, N, T, p, a.shape[3]):
        return g.new_zeros(B, dtype=result_dtype(g, a)), None
    if T == 1:
        return by_rows(g, a, notes), None
    kernel = kernel_for(g, a)
    chosen = _weighed(costs.outer_norm_method, g, a, notes, kernel)
    if chosen == "direct":
        return direct(g, a), None
    if chosen == "fused" and kernel is not None:
        norms, sizes, trusted = fused_gram(kernel, g, a, notes)
        return norms, None if trusted else sizes
    return gram(g, a, notes)


def method(g: Tensor, a: Tensor, notes: Notes | None = None) -> str:
    """Which method `sq_norms` takes."""
    return _weighed(costs.outer_norm_method, g, a, notes, kernel_for(g, a))


def cost(g: Tensor, a: Tensor, notes: Notes | None = None) -> int:
    """Multiply-adds of that method, for one example and group."""
    return _weighed(costs.outer_norm_cost, g, a, notes, kernel_for(g, a))


def _weighed(
    by_cost: Callable[..., _Found], g: Tensor, a: Tensor, notes: Notes | None, kernel: Fused | None
) -> _Found:
    T, p, d = g.shape[2], g.shape[3], a.shape[3]
    readers = summed = 0
    if notes is not None:
        readers = 0 if notes.kept is None else notes.kept.readers
        summed = 0 if notes.summed is None else notes.summed.shape[3]
        if notes.read is g:
            p, d = d, p  # the width of the side that others read too comes last
    return by_cost(
        T, p, d, max(1, readers), constants(g.device, result_dtype(g, a)),
        fused=kernel is not None, summed=summed,
    )  # fmt: skip


def by_rows(g: Tensor, a: Tensor, notes: Notes | None = None) -> Tensor:
    """T = 1: Σ_n |g_n|² |a_n|². N (p + d) multiply-adds."""
    dtype = result_dtype(g, a)
    left, right = last_squares(g, dtype), last_squares(a, dtype)  # (B, N, 1), no copy on the way
    if notes is not None and notes.summed is not None and g.shape[1] == 1:
        notes.sq_norms = (left if notes.summed is g else right).reshape(-1)
    return (left * right).flatten(1).sum(1) if g.shape[1] > 1 else (left * right).reshape(-1)


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
