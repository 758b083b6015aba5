"""Influence by the empirical Fisher matrix, exactly, without forming it: a solve of size N.

Owns: the Gram matrix of all training gradients, streamed, and the solve with it.
Does not know: queries, or who reads the scores.

With J the N gradients and C those of the queries, F = J'J / N:

    (1/N) C (F + d)⁻¹ J' = C J' (J J' + N d)⁻¹

The damping is a share of tr(J J') / N, which is the mean squared norm of a gradient, added to J J'.
"""

import io

import numpy as np
import torch
from torch import Tensor

from pergrad import api
from pergrad.attribution.batches import Batch, Batches
from pergrad.attribution.folder import Folder
from pergrad.attribution.progress import tell
from pergrad.attribution.ranking import npy
from pergrad.attribution.together import Crew
from pergrad.engine.run import PassOptions
from pergrad.errors import UsageError
from pergrad.factors.numeric import bytes_of
from pergrad.factors.workspace import free_bytes
from pergrad.matrix import GradientMatrix

DAMPING = 0.5  # of the mean squared norm
HELD_BYTES = 2**30  # of factors, between which and all others products are taken


def check_size(examples: int) -> None:
    """The matrix, its factorisation and the products fit into memory.

    Raises:
        UsageError: they do not.
    """
    needed, free = 3 * 8 * examples**2, free_bytes(None)
    if free is not None and needed > free:
        raise UsageError(
            f'method="kernel" solves with a matrix of {examples:,} x {examples:,}, which takes '
            f"{needed:,} bytes of memory where {free:,} are free. Use a curvature "
            "(`curvature=pergrad.curvature(...)`) or fewer examples."
        )


def gram(folder: Folder, batches: Batches, crew: Crew, options: PassOptions) -> Tensor:
    """J J' (N, N), float64. Rows that the folder has are read, the others are the crew's tasks."""
    total = len(batches.job)
    G = np.zeros((total, total))
    begin = 0
    for first, stop, path in folder.files("gram"):
        G[first:stop, first:] = np.load(io.BytesIO(folder.read(path)), allow_pickle=False)
        begin = stop
    if begin < total:
        most = _held_at_once(batches, begin, options)

        def step(size: int) -> int:
            share = -(-(total - begin) // size)
            return max(1, min(most, -(-share // batches.size) * batches.size))

        for block, found in crew.each("kernel", [], {}, [range(begin, total)], step):
            own = found["rows"].numpy()
            folder.add("gram", block.start, block.stop, npy(own), "npy")
            G[block.start : block.stop, block.start :] = own
            tell("rows of the kernel", block.stop, total)
    upper = torch.from_numpy(G).triu()
    return upper + upper.triu(1).mT


def rows(batches: Batches, block: range, options: PassOptions) -> Tensor:
    """Inner products of some neighbouring examples with themselves and all that come after them."""
    total = len(batches.job)
    found = np.zeros((len(block), total - block.start))
    begin = block.start
    while begin < block.stop:
        held = _held(batches, range(begin, block.stop), options)
        for batch in batches.over(range(begin, total)):
            own = next((J for b, J in held if b.rows == batch.rows), None)
            K = own if own is not None else _gradients(batches, batch, options)
            columns = slice(batch.rows.start - block.start, batch.rows.stop - block.start)
            for b, J in held:
                at = slice(b.rows.start - block.start, b.rows.stop - block.start)
                found[at, columns] = (J @ K.T).cpu().double().numpy()
        begin = held[-1][0].rows.stop
    _check(found, block.start)
    return torch.from_numpy(found)


def _held_at_once(batches: Batches, begin: int, options: PassOptions) -> int:
    """How many examples' factors may be held, whole batches of them, as the next batch's are."""
    batch = next(iter(batches.over(range(begin, len(batches.job)))))
    each = bytes_of(_gradients(batches, batch, options)._unique_tensors()) / len(batch.rows)
    return max(1, int(HELD_BYTES / each) // batches.size) * batches.size


def _check(rows: np.ndarray, begin: int) -> None:
    bad = np.flatnonzero(~np.isfinite(rows.diagonal()))
    if len(bad):
        raise UsageError(
            f"Example {begin + bad[0]} has a gradient that is not finite, and would spoil the "
            "kernel of all. Take it out, or find out why (see `job.losses(job.model, batch)`)."
        )


def _held(
    batches: Batches, rows: range, options: PassOptions
) -> list[tuple[Batch, GradientMatrix]]:
    """The gradients of the first of these batches, as many as may be held at once."""
    held: list[tuple[Batch, GradientMatrix]] = []
    taken = 0
    for batch in batches.over(rows):
        J = _gradients(batches, batch, options)
        held.append((batch, J))
        taken += bytes_of(J._unique_tensors())
        if taken > HELD_BYTES:
            break
    return held


def _gradients(batches: Batches, batch: Batch, options: PassOptions) -> GradientMatrix:
    return api.gradients(batches.losses(batch), batches.params, **options)


class Solve:
    """C J' -> C J' (J J' + damping)⁻¹."""

    def __init__(self, G: Tensor, damping: float) -> None:
        self.added = damping * float(G.diagonal().mean())
        if self.added == 0:
            raise UsageError(
                "All training gradients are 0: nothing has any influence. Check the losses."
            )
        self.factor, _ = torch.linalg.cholesky_ex(
            G + self.added * torch.eye(len(G), dtype=G.dtype), check_errors=True
        )

    def __call__(self, products: Tensor) -> Tensor:
        """(N, Q) from J C' (N, Q)."""
        return torch.cholesky_solve(products.double(), self.factor)
