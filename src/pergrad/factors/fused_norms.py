"""Norms from Grams that are never written to memory, by the compiled kernel.

Owns: its room, half precision, what goes to `Notes`.
Does not know: when this is the method to use, and what is done where it may not be trusted.
"""

import torch
from torch import Tensor

from pergrad.factors.guard import KAPPA_LIMIT
from pergrad.factors.notes import Notes
from pergrad.factors.numeric import result_dtype, tracing
from pergrad.factors.workspace import chunks, lent, limit
from pergrad.kernels import Fused, Grid, Norms, fused

# Not cache-sized: there should be examples for all threads.
_WIDENED_BYTES = 32 * 2**20


def kernel_for(g: Tensor, a: Tensor) -> Fused | None:
    """The kernel that serves these, None if there is none or autograd has to see what is done."""
    if tracing(g, a):
        return None
    kernel = fused(g.device, result_dtype(g, a))
    return kernel if kernel is not None and kernel.reads(g, a) else None


def fused_gram(
    kernel: Fused, g: Tensor, a: Tensor, notes: Notes | None = None
) -> tuple[Tensor, Tensor, bool]:
    """Σ_ts (g_t·g_s)(a_t·a_s) and |A|²|G|², both (B,), and whether κ is below its limit in all."""
    notes = notes or Notes()
    dtype = kernel.dtype
    B, N, T, _ = g.shape
    turned = notes.read is g  # the kernel keeps the Gram of its second matrix
    one, two = (a, g) if turned else (g, a)
    cut = kernel.cut(B * N, T)
    formed = notes.blocks("tiles")
    ours = notes.room([(B, N, cut.tiles)], dtype) if formed is None else None
    places = formed or ours
    kept = None if places is None else places[0]
    limit = KAPPA_LIMIT[dtype] ** 2
    with lent(_threads(B * N * cut.tasks) * cut.room, dtype, g.device) as room:
        if one.dtype == two.dtype == dtype:
            found = kernel.norms(one, two, cut, room, limit, kept, formed=formed is not None)
        else:
            found = _joined([
                kernel.norms(
                    one[rows].to(dtype), two[rows].to(dtype), cut, room, limit,
                    None if kept is None else kept[rows], formed=formed is not None,
                )
                for rows in _widened(one, two, dtype)
            ])  # fmt: skip
    if ours is not None:
        notes.keep(ours, "tiles")
    if notes.summed is not None and N == 1:
        pair = 1 if (notes.summed is g) != turned else 2
        notes.sq_norms = found.results[2 * pair]
        notes.sizes = found.results[2 * pair + 1] if found.doubtful[pair] else None
    return found.results[0], found.results[1], not found.doubtful[0]


def fused_shifts(kernel: Fused, g: Tensor, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor, bool]:
    """The same for patches X: Σ_ts (g_t·g_s) Σ_k x_{t+k}·x_{s+k} and |X|²|G|².

    g (B, N, T, p), and pixels x (B, N, S, c) with places in a grid.
    """
    B, N, T, _ = g.shape
    dtype, limit = kernel.dtype, KAPPA_LIMIT[kernel.dtype] ** 2
    with lent(_threads(B * N) * kernel.shift_room(T, grid.places), dtype, g.device) as room:
        found = _joined([
            kernel.shift_norms(g[rows].to(dtype), x[rows].to(dtype), grid, room, limit)
            for rows in _widened(g, x, dtype)
        ])  # fmt: skip
    return found.results[0], found.results[1], not found.doubtful[0]


def _threads(tasks: int) -> int:
    return max(1, min(torch.get_num_threads(), tasks))


def _widened(g: Tensor, a: Tensor, dtype: torch.dtype) -> list[slice]:
    """Examples that are copied to another dtype at a time; all where none are."""
    if g.dtype == a.dtype == dtype:
        return [slice(0, len(g))]
    each = (g[:1].numel() + a[:1].numel()) * dtype.itemsize
    return chunks(len(g), each, min(limit(g.device), _WIDENED_BYTES))


def _joined(found: list[Norms]) -> Norms:
    if len(found) == 1:
        return found[0]
    one, two, three = (sum(counts) for counts in zip(*(x.doubtful for x in found), strict=True))
    return Norms(torch.cat([x.results for x in found], 1), (one, two, three))
