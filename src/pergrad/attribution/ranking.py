"""Scores on their way to the disk: every pair, or the strongest of each query.

Owns: blocks of scores (examples, queries) taken in order, written now and then, gone on with.
Does not know: how a score is computed, or who reads it.

    pairs{k}-{first}-{stop}-….npy     scores (examples, queries of block k), row-major
    ends{k}-0-{next}-….npz            the k highest and lowest so far of each query in block k
"""

import io
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pergrad.attribution.folder import Folder
from pergrad.errors import StoreError

if TYPE_CHECKING:
    import pyarrow as pa

SECONDS_BETWEEN_FILES = 10.0
ROWS_PER_FILE = 2**16
BYTES_PER_FILE = 2**26


class Keeper(Protocol):
    """Takes scores of neighbouring examples, in order."""

    next: int  # the first example that is missing

    def add(self, scores: np.ndarray) -> None:
        """The next examples' scores, (examples, queries)."""

    def flush(self) -> None:
        """Write what has been taken."""


def npy(array: np.ndarray) -> bytes:
    """An array as the content of a .npy file."""
    sink = io.BytesIO()
    np.save(sink, array, allow_pickle=False)
    return sink.getvalue()


class Pairs:
    """Every pair."""

    def __init__(self, folder: Folder, kind: str) -> None:
        self.folder, self.kind = folder, kind
        # in one piece: many small arrays between the large ones of a pass leave holes
        self.room: np.ndarray | None = None
        self.filled = 0
        self.last = time.monotonic()
        self.next = 0
        for first, stop, path in folder.files(kind):
            if first != self.next:
                raise StoreError(
                    f"{path} begins at example {first}, where {self.next} is missing: a file "
                    "before it is gone. Remove it and what comes after, and make the same call "
                    "again: it computes what is missing."
                )
            self.next = stop

    def add(self, scores: np.ndarray) -> None:
        """The next examples' scores."""
        if self.room is not None and self.filled + len(scores) > len(self.room):
            self.flush()
        if self.room is None or len(scores) > len(self.room):
            each = max(1, scores[:1].nbytes)
            rows = max(len(scores), min(ROWS_PER_FILE, BYTES_PER_FILE // each))
            self.room = np.empty((rows, *scores.shape[1:]), scores.dtype)
        self.room[self.filled : self.filled + len(scores)] = scores
        self.filled += len(scores)
        full = self.filled == len(self.room)
        if full or time.monotonic() - self.last > SECONDS_BETWEEN_FILES:
            self.flush()

    def flush(self) -> None:
        """Write what has been taken."""
        if self.room is not None and self.filled:
            rows = self.room[: self.filled]
            self.folder.add(self.kind, self.next, self.next + len(rows), npy(rows), "npy")
            self.next += len(rows)
        self.filled, self.last = 0, time.monotonic()


def read_pairs(folder: Folder, kind: str) -> np.ndarray:
    """(examples, queries)."""
    parts = [
        np.load(io.BytesIO(folder.read(path)), allow_pickle=False)
        for _, _, path in folder.files(kind)
    ]
    return np.concatenate(parts)


def strongest(folder: Folder, kind: str, top: int) -> "tuple[Ranked, Ranked]":
    """Of every pair the highest and the lowest scores of each query, a file at a time."""
    high = low = None
    for first, stop, path in folder.files(kind):
        scores = np.load(io.BytesIO(folder.read(path)), allow_pickle=False).T
        new = scores, np.broadcast_to(np.arange(first, stop), scores.shape)
        none = new[0][:, :0], new[1][:, :0]
        high, low = ends(high or none, new, top, 1), ends(low or none, new, top, -1)
    assert high is not None
    assert low is not None
    return high, low


class Ends:
    """The highest and the lowest scores of each query; of equal ones the first examples'."""

    def __init__(self, folder: Folder, kind: str, queries: int, top: int, dtype: str) -> None:
        self.folder, self.kind, self.top = folder, kind, top
        self.last = time.monotonic()
        empty = np.empty((queries, 0), dtype), np.empty((queries, 0), np.int64)
        self.high, self.low = empty, empty
        self.next = self.seen = 0
        files = folder.files(kind)
        if files:
            _, self.next, path = files[-1]
            self.seen = self.next
            with np.load(io.BytesIO(folder.read(path)), allow_pickle=False) as found:
                self.high = found["high"], found["high_index"]
                self.low = found["low"], found["low_index"]

    def add(self, scores: np.ndarray) -> None:
        """The next examples' scores."""
        index = np.arange(self.seen, self.seen + len(scores))
        new = scores.T, np.broadcast_to(index, scores.T.shape)
        self.high = ends(self.high, new, self.top, 1)
        self.low = ends(self.low, new, self.top, -1)
        self.seen += len(scores)
        if time.monotonic() - self.last > SECONDS_BETWEEN_FILES:
            self.flush()

    def flush(self) -> None:
        """Write what has been taken."""
        if self.seen > self.next:
            sink = io.BytesIO()
            np.savez(
                sink, high=self.high[0], high_index=self.high[1], low=self.low[0],
                low_index=self.low[1], allow_pickle=False,
            )  # fmt: skip
            old = self.folder.files(self.kind)
            self.folder.add(self.kind, 0, self.seen, sink.getvalue(), "npz")
            for _, _, path in old:
                path.unlink(missing_ok=True)
            self.next = self.seen
        self.last = time.monotonic()


Ranked = tuple[np.ndarray, np.ndarray]  # scores and numbers of examples, (queries, at most top)


def ends(kept: Ranked, new: Ranked, top: int, sign: int) -> Ranked:
    """The `top` of both with the largest sign * score, those first that came first."""
    scores = np.concatenate([kept[0], new[0]], 1)
    index = np.concatenate([kept[1], new[1]], 1)
    order = np.argsort(-sign * scores, 1, kind="stable")[:, :top]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(index, order, 1)


def of_blocks(folder: Folder, blocks: Sequence[range], top: int, dtype: str) -> "pa.Table":
    """One table of the ends of all queries, from those of each block of queries."""
    import pyarrow as pa

    columns: dict[str, list[Any]] = {}
    for k, rows in enumerate(blocks):
        ends = Ends(folder, f"ends{k}", len(rows), top, dtype)
        for end, (scores, index) in (("top", ends.high), ("bottom", ends.low)):
            columns.setdefault(f"{end}_index", []).extend(index)
            columns.setdefault(f"{end}_score", []).extend(scores)
    return pa.table({"query": pa.array(range(sum(len(rows) for rows in blocks))), **columns})
