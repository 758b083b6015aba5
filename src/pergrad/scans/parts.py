"""The files that rows are in: their names, and which of them count.

Owns: what a part's name says, reading it whole, and parts that were written again with other
columns: each of them says how often it was (its turn), and for which columns.
Does not know: what the columns mean.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pergrad import folders
from pergrad.errors import StoreError
from pergrad.scans.text import printable

_NAME = re.compile(r"part-(\d{12,})-(\d+)-([0-9a-f]{32})\.parquet")
_TURN, _MARK = b"pergrad.turn", b"pergrad.columns"


@dataclass(frozen=True, slots=True)
class Part:
    """One file of scores, as its name tells."""

    path: Path
    first: int
    rows: int
    digest: str

    def load(self) -> bytes | None:
        """Its bytes, None if they are not those that were written."""
        try:
            content = folders.read(self.path)
        except OSError:
            return None
        return content if digest_of(content) == self.digest else None

    def rank(self) -> tuple[int, int]:
        """Its turn and how many columns it has; the least if it is damaged."""
        content = self.load()
        try:
            found = None if content is None else pq.read_schema(pa.BufferReader(content))
        except pa.ArrowException:
            found = None
        return (-1, 0) if found is None else (turn_of(found)[0], len(found))


def turn_of(schema: pa.Schema) -> tuple[int, str]:
    """How often a part was written again, and the mark of the columns that was done for."""
    about = schema.metadata or {}
    turn, mark = about.get(_TURN, b"0"), about.get(_MARK, b"")
    return int(turn) if turn.isdigit() and len(turn) < 10 else 0, mark.decode(errors="replace")


def in_turn(schema: pa.Schema, turn: int, mark: str) -> pa.Schema:
    """The schema of a part that is written again."""
    return schema.with_metadata({_TURN: str(turn), _MARK: mark})


@dataclass(frozen=True, slots=True)
class Packed:
    """A part that is not a file yet."""

    first: int
    rows: int
    digest: str
    content: bytes

    @property
    def name(self) -> str:
        """Its name, which certifies the content."""
        return f"part-{self.first:012d}-{self.rows}-{self.digest}.parquet"


def pack(table: pa.Table) -> Packed:
    """Rows as the bytes of a part."""
    table = table.sort_by("index") if len(table) > 1 else table
    sink = pa.BufferOutputStream()
    floats = [f.name for f in table.schema if pa.types.is_floating(f.type)]
    strings = [f.name for f in table.schema if pa.types.is_string(f.type)]
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=False,
        use_byte_stream_split=floats,
        column_encoding={"index": "DELTA_BINARY_PACKED"}
        | dict.fromkeys(strings, "DELTA_BYTE_ARRAY"),
        store_schema=True,
    )
    content = sink.getvalue().to_pybytes()
    return Packed(table["index"][0].as_py(), len(table), digest_of(content), content)


def digest_of(content: bytes | memoryview) -> str:
    """What a file's name says of its content."""
    return blake2b(content, digest_size=16).hexdigest()


def parts_in(folder: Path) -> list[Part]:
    """All parts in a folder, by their first example.

    Raises:
        StoreError: another Parquet file is there.
    """
    found = []
    for name in os.listdir(folder) if folder.is_dir() else ():
        match = _NAME.fullmatch(name)
        if match:
            found.append(Part(folder / name, int(match[1]), int(match[2]), match[3]))
        elif name.endswith(".parquet"):
            raise StoreError(
                f"{printable(folder / name)} is not a part that pergrad wrote. Everything that "
                "reads the folder would read it too: move it elsewhere."
            )
    return sorted(found, key=lambda part: (part.first, part.path.name))


def latest(parts: Sequence[Part]) -> list[Part]:
    """Without those that were written again with other columns, and not removed yet.

    No two parts of a scan begin with the same example, so such a pair is one part twice, and the
    one of the later turn counts; parts of earlier versions have no turn, and the wider one counts.
    Where neither decides they are none of ours, and stay: who reads them finds examples twice.
    """
    kept: list[Part] = []
    for _, several in groupby(parts, key=lambda part: (part.first, part.rows)):
        same = list(several)
        if len(same) > 1:
            ranks = [part.rank() for part in same]
            same = [p for p, rank in zip(same, ranks, strict=True) if rank == max(ranks)]
        kept += same
    return kept
