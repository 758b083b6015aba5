"""Rows of examples that wait for the disk.

Owns: `Waiting`: their columns, in blocks that are taken once, and tables of them, one at a time;
the columns of the table of examples.
Does not know: files, the rows of steps, what the numbers mean.

What stays from step to step lies in a few blocks, which come from the system, not from the heap.
Small tensors kept between the large ones that each training step makes and frees would keep the
memory around them as well: several times their own.
"""

import mmap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 1 << 14  # of a block
BLOCKS = 8  # that are kept to be used again
EXAMPLES = pa.schema(
    [
        ("step", pa.int64()), ("rank", pa.int64()), ("row", pa.int64()), ("key", pa.string()),
        ("loss", pa.float64()), ("tokens", pa.int64()), ("weight", pa.float64()),
        ("norm", pa.float64()), ("score", pa.float64()), ("ratio", pa.float64()),
        ("outlier", pa.bool_()),
    ]
)  # fmt: skip
_FLOATS = ("loss", "weight", "norm", "score", "ratio")
_KINDS: dict[str, np.dtype[Any]] = {
    **dict.fromkeys(_FLOATS, np.dtype(np.float64)),
    **dict.fromkeys(("step", "row", "tokens"), np.dtype(np.int64)),
    "outlier": np.dtype(np.bool_),
}  # fmt: skip


class _Block:
    """Room for some rows."""

    def __init__(self) -> None:
        room, at = mmap.mmap(-1, ROWS * sum(kind.itemsize for kind in _KINDS.values())), 0
        self.columns: dict[str, np.ndarray[Any, Any]] = {}
        for name, kind in _KINDS.items():
            self.columns[name] = np.frombuffer(room, kind, ROWS, at)
            at += ROWS * kind.itemsize
        self.clear()

    def clear(self) -> None:
        self.used = 0
        self.keys: list[pa.Array] = []  # of each step, not as Python's strings: a tenth of these


class Waiting:
    """Rows, in the order in which they came."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(
        self, step: int, keys: Sequence[str | None], columns: Mapping[str, "Tensor"]
    ) -> None:  # fmt: skip
        """The rows of one step's examples."""
        given = {name: column.numpy() for name, column in columns.items()}
        begin = 0
        while begin < len(keys):
            at, used = divmod(self._count, ROWS)
            if at == len(self._blocks):
                self._blocks.append(_Block())
            block, end = self._blocks[at], min(len(keys), begin + ROWS - used)
            here = slice(used, used + end - begin)
            for name, values in given.items():
                block.columns[name][here] = values[begin:end]
            block.columns["step"][here] = step
            block.columns["row"][here] = np.arange(begin, end)
            block.keys.append(pa.array(keys[begin:end], pa.string()))
            block.used = here.stop
            self._count += end - begin
            begin = end

    @property
    def first_step(self) -> int:
        """That of the first row."""
        return int(self._blocks[0].columns["step"][0])

    def tables(self, rank: int) -> Iterator[pa.Table]:
        """All rows; a table is good until the next one is asked for."""
        for block in self._blocks:
            if block.used:
                values = {name: column[: block.used] for name, column in block.columns.items()}
                values |= {"rank": np.full(block.used, rank)}
                arrays = {name: pa.array(column) for name, column in values.items()}
                arrays |= {"key": pa.chunked_array(block.keys, pa.string())}
                yield pa.table([arrays[name] for name in EXAMPLES.names], schema=EXAMPLES)

    def clear(self) -> None:
        """They are on the disk; their room is used again."""
        del self._blocks[BLOCKS:]
        for block in self._blocks:
            block.clear()
        self._count = 0
