"""Norms of `Correlation`: those of an `Outer` over patches, and three that lay out no patches.

Owns: `METHODS`, and the formulas of each.
Does not know: when a Gram's result may be trusted, what is done instead.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pergrad.factors import costs
from pergrad.factors.constants import Constants
from pergrad.factors.correlation.shifts import shifted
from pergrad.factors.methods.choice import Method
from pergrad.factors.methods.fused import fused_shifts, kernel_for
from pergrad.factors.numeric import last_squares
from pergrad.factors.outer import norms as outer_norms
from pergrad.factors.workspace import by_chunks, chunks, scratch
from pergrad.kernels import grid_of

if TYPE_CHECKING:
    from pergrad.factors.correlation.factor import Correlation

Pair = outer_norms.Pair


class Sizes(NamedTuple):
    """What the choice goes by; but for `call` of one of N groups."""

    outer: outer_norms.Sizes  # of patches
    N: int
    window: int  # positions that the kernel sees
    k: int  # terms of a patch, for each channel
    pixels: int
    call: int | None  # numbers that torch's own gradient reads; None if it cannot be called
    fused_shift: bool  # whether the compiled kernel serves shifts


def over_patches(method: Method) -> Method:
    """A method of `Outer`, over explicit patches."""

    def time(n: Sizes, by: Constants) -> float:
        patches = n.outer.T * (n.outer.p + n.outer.d) * by.patch_overhead
        return method.time(n.outer, by) + patches

    def norms(f: "Correlation") -> Pair:
        found: list[Pair] = []
        for rows in chunks(f.batch, f.patch_bytes, scratch(f.device)):
            part = f.outer(rows)
            found.append(method.norms(part.g, part.a, None, kernel_for(part.g, part.a))[0])
        norms = torch.cat([one for one, _ in found])
        if all(size is None for _, size in found):
            return norms, None
        # no size at all where no Gram was taken
        sizes = [torch.zeros_like(one) if size is None else size for one, size in found]
        return norms, torch.cat(sizes)

    return Method(
        method.name,
        available=lambda n: method.available(n.outer),
        time=time,
        count=lambda n, by: n.N * method.count(n.outer, by),
        norms=norms,
    )


def by_shifts(f: "Correlation") -> Pair:
    """From shifted Grams of single pixels, by torch's products."""
    N, T, _, _ = f.sizes

    def piece(rows: slice) -> Tensor:
        g, x = f.still(rows), f.window(rows)
        return shifted(g, x, N, f.kernel, f.stride, f.dilation)

    each = N * (f.window_size**2 + 2 * T * T) * f.dtype.itemsize
    both = by_chunks(f.batch, each, piece, like=f._zeros(0), tail=(2,), budget=scratch(f.device))
    return both[:, 0], both[:, 1]


def by_fused_shifts(f: "Correlation") -> Pair:
    """The same by the compiled kernel."""
    kernel = f.shift_kernel
    assert kernel is not None
    N, T, p, _ = f.sizes
    grid = grid_of(tuple(f.x.shape[2:]), f.out, f.kernel, f.stride, f.padding, f.dilation)
    g = f.g.reshape(f.batch, N, p, T)
    x = f.x.reshape(f.batch, N, f.x.shape[1] // N, -1)
    norms, sizes, trusted = fused_shifts(kernel, g.mT, x.mT, grid)
    return norms, None if trusted else sizes


def by_convolutions(f: "Correlation") -> Pair:
    """From torch's own gradient for each example."""
    # rows of a kernel are short enough for one running sum each, see `LONG_ROW`
    found = [last_squares(grads.flatten(2), f.dtype) for _, grads in f.kernels()]
    return torch.cat(found).sum(1), None


def _shift_count(n: Sizes, by: Constants) -> int:
    T, p, d, *_ = n.outer
    return costs.shift_norm_cost(T, n.window, p, d, n.k, by)


def _shift_time(n: Sizes, by: Constants) -> float:
    return by.shift_overhead * _shift_count(n, by) + by.shift_calls


def _fused_shift_count(n: Sizes) -> int:
    T, p, d, *_ = n.outer
    return costs.fused_shift_norm_cost(T, n.pixels, p, d, n.k)


def _fused_shift_time(n: Sizes, by: Constants) -> float:
    T, p, d, *_ = n.outer
    added = n.k * T * n.window / 2 + T * T + n.pixels * n.pixels
    return (
        by.fused_overhead * _fused_shift_count(n)
        + by.fused_shift_elementwise * added
        + by.fused_reading * (T * p + n.pixels * (d // n.k))
    )


def _call_time(n: Sizes, by: Constants) -> float:
    T, p, d, *_ = n.outer
    moved = (by.call_reads * (n.call or 0) + by.call_overhead) / n.N
    return T * p * d + by.call_elementwise * p * d + moved


PATCHES = tuple(over_patches(method) for method in outer_norms.METHODS)
WITHOUT_PATCHES = (
    Method(
        "shift",
        available=lambda n: n.outer.T > 1 and n.k > 1,
        time=_shift_time,
        count=lambda n, by: n.N * _shift_count(n, by),
        norms=by_shifts,
    ),
    Method(
        "fused shift",
        available=lambda n: n.outer.T > 1 and n.k > 1 and n.fused_shift,
        time=_fused_shift_time,
        count=lambda n, by: n.N * _fused_shift_count(n),
        norms=by_fused_shifts,
    ),
    Method(
        "convolution",
        available=lambda n: n.outer.T > 1 and n.call is not None,
        time=_call_time,
        count=lambda n, by: n.N * costs.direct_norm_cost(*n.outer[:3]),
        norms=by_convolutions,
    ),
)
METHODS = PATCHES + WITHOUT_PATCHES


def torch_forms_faster(n: Sizes, by: Constants) -> bool:
    """Whether gradients that are formed anyway are formed by torch, rather than from patches."""
    called, patched = (
        next(m for m in METHODS if m.name == name) for name in ("convolution", "direct")
    )
    return called.available(n) and called.time(n, by) < patched.time(n, by)
