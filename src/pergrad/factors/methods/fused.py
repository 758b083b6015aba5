"""Norms from Grams that are never written to memory, by the compiled kernel.

Owns: its room, half precision.
Does not know: when this is the method to use, and what is done where it may not be trusted.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from pergrad.factors.guard import KAPPA_LIMIT
from pergrad.factors.numeric import result_dtype, tracing
from pergrad.factors.workspace import chunks, lent, limit
from pergrad.kernels import Fused, Grid, Norms, fused
from pergrad.recording import is_recorded

# Not cache-sized: there should be examples for all threads.
_WIDENED_BYTES = 32 * 2**20


def kernel_for(g: Tensor, a: Tensor) -> Fused | None:
    """The kernel that serves these, None if there is none or autograd has to see what is done."""
    if tracing(g, a) or is_recorded():
        return None
    kernel = fused(g.device, result_dtype(g, a))
    return kernel if kernel is not None and kernel.reads(g, a) else None


def fused_gram(kernel: Fused, g: Tensor, a: Tensor) -> Norms:
    """Σ_ts (g_t·g_s)(a_t·a_s) and |A|²|G|², and what else the kernel tells, see `Norms`."""
    dtype, limit = kernel.dtype, KAPPA_LIMIT[kernel.dtype] ** 2
    B, N, T, _ = g.shape
    cut = kernel.cut(B * N, T)
    with lent(_threads(B * N * cut.tasks) * cut.room, dtype, g.device) as room:
        return _joined([
            kernel.norms(left, right, cut, room, limit) for left, right in _widened(g, a, dtype)
        ])  # fmt: skip


def fused_shifts(kernel: Fused, g: Tensor, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor, bool]:
    """The same for patches X: Σ_ts (g_t·g_s) Σ_k x_{t+k}·x_{s+k} and |X|²|G|².

    g (B, N, T, p), and pixels x (B, N, S, c) with places in a grid.
    """
    B, N, T, _ = g.shape
    dtype, limit = kernel.dtype, KAPPA_LIMIT[kernel.dtype] ** 2
    with lent(_threads(B * N) * kernel.shift_room(T, grid.places), dtype, g.device) as room:
        found = _joined([
            kernel.shift_norms(left, right, grid, room, limit)
            for left, right in _widened(g, x, dtype)
        ])  # fmt: skip
    return found.results[0], found.results[1], not found.doubtful[0]


def _threads(tasks: int) -> int:
    return max(1, min(torch.get_num_threads(), tasks))


def _widened(g: Tensor, a: Tensor, dtype: torch.dtype) -> Iterable[tuple[Tensor, Tensor]]:
    """Both in this dtype: copies of some examples at a time, or as they are."""
    if g.dtype == a.dtype == dtype:
        return [(g, a)]
    each = (g[:1].numel() + a[:1].numel()) * dtype.itemsize
    pieces = chunks(len(g), each, min(limit(g.device), _WIDENED_BYTES))
    return ((g[rows].to(dtype), a[rows].to(dtype)) for rows in pieces)


def _joined(found: list[Norms]) -> Norms:
    if len(found) == 1:
        return found[0]
    one, two, three = (sum(counts) for counts in zip(*(x.doubtful for x in found), strict=True))
    return Norms(torch.cat([x.results for x in found], 1), (one, two, three))
