"""Rows on their way to the disk: collected, and written as parts now and then.

Owns: how many rows or seconds a part holds, that each example is written once, and that the scan
does not wait for the disk, unless that is slower than it is.
Does not know: the form of a part (the store does), or how rows come about.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pergrad.scans.parts import Packed, Part, pack
from pergrad.scans.store import Store

ROWS_PER_PART = 2**16
SECONDS_PER_PART = 10.0
SECONDS_UNSETTLED = 1.0  # until the names of parts are forced to the disk, several at once


class _Columns:
    """Rows without errors, in columns that are allocated once. Kept as small tables they would lie
    between the activations on the heap, and keep it from shrinking: 300 MB, measured.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.schema: pa.Schema | None = None
        self.numbers: dict[str, np.ndarray] = {}
        self.keys: list[str] = []

    def add(self, table: pa.Table) -> None:
        """Append rows."""
        if self.schema is None:
            self.schema = table.schema
            self.numbers = {
                field.name: np.empty(ROWS_PER_PART, field.type.to_pandas_dtype())
                for field in table.schema
                if not pa.types.is_string(field.type)
            }
        end = self.rows + len(table)
        for name, values in self.numbers.items():
            if len(values) < end:
                values = self.numbers[name] = np.resize(values, 2 * end)
            values[self.rows : end] = table[name].to_numpy()
        if "key" in self.schema.names:
            self.keys += table["key"].to_pylist()
        self.rows = end

    def table(self) -> pa.Table:
        """All rows; valid until the next are added."""
        assert self.schema is not None
        columns = {name: pa.array(v[: self.rows]) for name, v in self.numbers.items()}
        columns["key"] = pa.array(self.keys, pa.string())
        columns["error"] = pa.nulls(self.rows, pa.string())
        return pa.Table.from_arrays([columns[n] for n in self.schema.names], schema=self.schema)

    def clear(self) -> None:
        """Forget the rows, keep the memory."""
        self.rows, self.keys = 0, []


class Writer:
    """Collects rows into parts, which a thread writes. To be left as a context is, so that it ends.

    One part at a time; what the disk says no to is raised when the next is written, or at the end.
    """

    def __init__(self, store: Store, wanted: np.ndarray) -> None:
        self.store, self.wanted = store, wanted.copy()
        self.good = _Columns()
        self.failed: list[pa.Table] = []
        self.rows = 0
        self.last = self.settled = time.monotonic()
        self.thread = ThreadPoolExecutor(1, "pergrad-writer")
        self.writing: Future[None] | None = None
        self.written: list[Part] = []

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.thread.shutdown()

    def add(self, table: pa.Table) -> int:
        """Take those rows that are wanted, each once; how many they are."""
        index = table["index"].to_numpy()
        new = self.wanted[index]
        if not new.all():
            table = table.filter(pa.array(new))
        self.wanted[index] = False
        good = table
        if table["error"].null_count < len(table):
            bad = pc.is_valid(table["error"])
            good = table.filter(pc.invert(bad))
            self.failed.append(table.filter(bad))
        if len(good):
            self.good.add(good)
        self.rows += len(table)
        now = time.monotonic()
        if self.rows >= ROWS_PER_PART or now - self.last > SECONDS_PER_PART:
            self._send()
        elif now - self.settled > SECONDS_UNSETTLED and not self.store.settled:
            self._wait()
            self._start([])
        return len(table)

    def flush(self, *, failed: bool = True) -> None:
        """Write what has been collected, for good."""
        self._send(failed=failed)
        self._wait()
        self.store.settle()

    def take_back(self) -> None:
        """What has been written does not count."""
        self._wait()
        for part in self.written:
            self.store.set_aside(part.path)

    def _send(self, *, failed: bool = True) -> None:
        """Have it written; examples that failed go into a part of their own, after the others, so
        that they can be tried again without touching any other.
        """
        self._wait()
        packed = [pack(self.good.table())] if self.good.rows else []
        self.good.clear()
        if self.failed and failed:
            packed.append(pack(pa.concat_tables(self.failed)))
            self.failed = []
        self.rows, self.last = 0, time.monotonic()
        self._start(packed)

    def _start(self, packed: Sequence[Packed]) -> None:
        self.writing = self.thread.submit(self._write, packed)

    def _wait(self) -> None:
        if self.writing is not None:
            self.writing.result()
            self.writing = None

    def _write(self, packed: Sequence[Packed]) -> None:
        for each in packed:
            self.written.append(self.store.put(each))
        if time.monotonic() - self.settled > SECONDS_UNSETTLED:
            self.store.settle()
            self.settled = time.monotonic()
