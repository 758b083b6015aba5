"""Short vectors of many examples on the disk: written in order, read a piece at a time.

Owns: the form of the files (half precision, one scale for each row), and estimates against queries.
Does not know: what the vectors are of, or what is done with estimates.

    rows-{first}-{stop}-….npy       float16 (examples, size), each row over its largest number
    scales-{first}-{stop}-….npy     float32 (examples, 2): that number, and the gradient's norm
"""

import io
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pergrad.attribution.folder import Folder
from pergrad.attribution.ranking import SECONDS_BETWEEN_FILES, npy
from pergrad.errors import StoreError

BYTES_PER_FILE = 2**25
PIECE = 2**14  # examples that are compared at a time
IN_CACHE = 2**9  # and of these, that are turned to full precision at a time


class Writer:
    """Takes the vectors of neighbouring examples, in order."""

    def __init__(self, folder: Folder, size: int) -> None:
        self.folder, self.most = folder, max(1, BYTES_PER_FILE // (2 * size))
        self.waiting: list[tuple[Tensor, Tensor]] = []
        self.last = time.monotonic()
        self.next = 0
        whole = {(first, stop) for first, stop, _ in folder.files("rows")}
        for first, stop, path in folder.files("scales"):
            if (first, stop) not in whole:
                path.unlink()  # of a run that was killed before it wrote the rows
        for first, stop, path in folder.files("rows"):
            check_next(first, self.next, path)
            self.next = stop

    def add(self, rows: Tensor, norms: Tensor) -> None:
        """The next examples' vectors, (n, size), and norms (n,)."""
        self.waiting.append((rows.cpu().float(), norms.cpu().float()))
        many = sum(len(rows) for rows, _ in self.waiting) >= self.most
        if many or time.monotonic() - self.last > SECONDS_BETWEEN_FILES:
            self.flush()

    def flush(self) -> None:
        """Write what has been taken."""
        if self.waiting:
            rows, norms = (torch.cat(parts) for parts in zip(*self.waiting, strict=True))
            scale = rows.abs().amax(1)
            half = (rows / torch.where(scale == 0, 1.0, scale)[:, None]).half()
            stop = self.next + len(rows)
            scales = torch.stack([scale, norms], 1)
            self.folder.add("scales", self.next, stop, npy(scales.numpy()), "npy")
            self.folder.add("rows", self.next, stop, npy(half.numpy()), "npy")
            self.next = stop
        self.waiting, self.last = [], time.monotonic()


def check_next(first: int, wanted: int, path: object) -> None:
    """Files follow each other without a gap.

    Raises:
        StoreError: they do not.
    """
    if first != wanted:
        raise StoreError(
            f"{path} begins at example {first}, where {wanted} is missing: a file before it is "
            "gone. Remove it and what comes after, and make the same call of pergrad.sketch again: "
            "it computes what is missing."
        )


def ends(folder: Folder) -> list[tuple[int, Tensor, float]]:
    """(number, vector, norm) of the first and of the last example there is."""
    scales = {(first, stop): path for first, stop, path in folder.files("scales")}
    rows = [each for each in folder.files("rows") if each[:2] in scales]
    found = []
    for (first, stop, path), at in ((rows[0], 0), (rows[-1], -1)) if rows else ():
        numbers = np.load(io.BytesIO(folder.read(scales[first, stop])), allow_pickle=False)[at]
        half = np.load(path, mmap_mode="r", allow_pickle=False)[at]
        vector = torch.from_numpy(np.array(half)).float() * float(numbers[0])
        found.append((first if at == 0 else stop - 1, vector, float(numbers[1])))
    return found


class Shards:
    """All vectors of a finished folder, in memory that the system may take back.

    Args:
        folder: the folder.
        examples: how many there have to be.

    Raises:
        StoreError: a file is damaged or gone.
    """

    def __init__(self, folder: Folder, examples: int) -> None:
        self.pieces: list[tuple[int, np.ndarray, Tensor]] = []
        scales = {(first, stop): path for first, stop, path in folder.files("scales")}
        at = 0
        for first, stop, path in folder.files("rows"):
            check_next(first, at, path)
            if (first, stop) not in scales:
                raise StoreError(
                    f"The scales of {path} are gone. Remove it and what comes after, and make the "
                    "same call of pergrad.sketch again: it computes what is missing."
                )
            folder.check(path)  # once; from then on it is mapped into memory
            content = folder.read(scales[first, stop])
            numbers = np.load(io.BytesIO(content), allow_pickle=False)
            self.pieces.append((first, np.load(path, mmap_mode="r"), torch.from_numpy(numbers)))
            at = stop
        check_next(examples, at, folder.path)

    def against(self, queries: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(first example, inner products (n, Q), norms (n,)) with queries (Q, size), in pieces."""
        wide = queries.mT.contiguous()
        # some rows at a time: in full precision they stay in the processor's cache
        half = torch.empty((IN_CACHE, queries.shape[1]), dtype=torch.float16)
        full = torch.empty(half.shape)
        for begin, rows, numbers in self.pieces:
            for lo in range(0, len(rows), PIECE):
                hi = min(lo + PIECE, len(rows))
                found = torch.empty((hi - lo, len(queries)))
                for first in range(lo, hi, IN_CACHE):
                    count = min(IN_CACHE, hi - first)
                    half.numpy()[:count] = rows[first : first + count]
                    full[:count].copy_(half[:count])
                    torch.mm(full[:count], wide, out=found[first - lo : first - lo + count])
                scale, norms = numbers[lo:hi].unbind(1)
                yield begin + lo, found.mul_(scale[:, None]), norms
